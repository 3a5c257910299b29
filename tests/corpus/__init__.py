"""Small good exports of every format, and what the validator says of faulty copies of them."""
