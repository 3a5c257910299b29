"""A comparison as one HTML file: `html.py` makes the page, the others what is in it."""
