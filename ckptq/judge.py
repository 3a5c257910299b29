"""A validation as the command line asks for it: what to fetch, whose rules, the checks, and the real server where it is wanted."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from ckptq import hub
from ckptq.console import Console
from ckptq.errors import UnsupportedError
from ckptq.reports import Asked, Outcome, groups
from ckptq.spelled import load_scope
from ckptq.validate import Checked, Validation, examine, is_diffusion
from ckptq.validators import servers, vllm_findings, vllm_load
from ckptq.validators.grouping import group
from ckptq.validators.servers import OMNI


def rules(asked: Asked, python: Path) -> servers.Server:
    """Of the version that was named; otherwise, of the one that is to load it where its rules are known."""
    if asked.vllm is not None:
        return servers.find_server(asked.vllm)
    return servers.SERVERS.get(servers.minor(vllm_load.version(python)), servers.DEFAULT) if asked.load else servers.DEFAULT


def judge(checkpoint: str, asked: Asked, python: Path, console: Console) -> Outcome:
    """Runs what was asked for. Raises a CkptqError where there can be no verdict."""
    if asked.load:
        vllm_load.find_program(python)  # before the minutes that all else may take
    scope = load_scope(asked.scope) if asked.scope is not None else None
    opened = hub.fetch(checkpoint, weights=asked.values or asked.load or asked.source is not None)
    origin = hub.fetch(asked.source, weights=True).root if asked.source else None
    if is_diffusion(opened.root) and (asked.load or asked.vllm or scope):
        option = "--load" if asked.load else "--vllm" if asked.vllm else "--scope"
        raise UnsupportedError(
            f"{option} is for language models: a diffusion pipeline is judged by the rules of vLLM-Omni {OMNI.version}"
        )
    try:
        found = examine(
            opened.root,
            source=origin,
            values=asked.values,
            progress=console,
            header=opened.header,
            server=asked.server,
            tp=asked.tp,
            ep=asked.ep,
            scope=scope,
            target=asked.target,
        )
    except UnsupportedError as unknown:
        if not asked.load:
            raise
        alone = vllm_findings.alone(opened.root.name, str(unknown))
        found = Validation((alone,), (), dict.fromkeys(groups(), "no rules for this checkpoint"), None)
    skipped = {what: why for what, why in found.skipped.items() if what != "server"}
    if not asked.load:
        skipped["server"] = "needs --load" if found.rules is None else "not asked about diffusion pipelines"
        return Outcome(
            checkpoint, asked, found.findings, found.checked, skipped, opened.label, None, found.built,
            scope=found.scope, judged_by=found.rules,
        )  # fmt: skip
    start = time.monotonic()
    with console.stage("server", 1) as advance:
        served = vllm_load.load(opened.root, python, generate=asked.generate, scope=scope)
        advance(1)
    checked = (*found.checked, Checked("server", 1, "steps", time.monotonic() - start))
    findings = (*found.findings, *served.findings, *vllm_findings.other_version(served.version, asked.server))
    facts = {key: value for key, value in asdict(served).items() if key != "findings"}
    return Outcome(checkpoint, asked, tuple(group(findings)), checked, skipped, opened.label, facts, found.built, scope=found.scope)
