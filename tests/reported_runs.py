"""Runs as they lie in their folders, made without training."""

from __future__ import annotations

import json

from mollm.audit import Audit, CurvePoint, Finding
from mollm.evaluation.records import Record
from mollm.evaluation.summary import Estimate, Evaluation
from mollm.methods.method import OBJECTIVES
from mollm.report.run_file import write_run
from mollm.training.history import StepRecord, write_history

EVIL = "<script>alert('&')</script> a/very/long/" + "word" * 30

EVIL_NAME = "<script>alert('x')</script>&\"'"
ABOUT = {
    "model": EVIL_NAME,
    "original": "SmolLM2",
    "retain_only": None,
    "forget": "forget.jsonl",
    "device": EVIL_NAME,
    "versions": {"mollm": "0", EVIL_NAME: "1"},
    "finished": "2026-01-01",
}
CURVE = tuple(
    CurvePoint(size, f"{kind}, lr {lr:g}", share, base)
    for kind in ("full", "LoRA")
    for lr, share, base in ((5e-4, 0.25, 0.0), (1.5e-3, 1.4, 0.5))
    for size in (1, 10, 100)
)


def audit(**changes):
    finding = Finding(
        *(EVIL_NAME, 0.5, (0.25, 0.75), 0.1, 0.3, "FAIL", EVIL_NAME, 0.45, 0.9, None, 12),
        setting=EVIL_NAME,
    )
    settings = {
        "learning_rates": [5e-4],
        "seed": 0,
        "chat": {"template": None, "prompt": EVIL_NAME},
    }
    rows = {"forget": 24, "to teach": 12, "measured": 12}
    values = ("FAIL", (finding,), CURVE, {EVIL_NAME: EVIL_NAME}, (EVIL_NAME,), rows, settings)
    return Audit(*values, **changes)


def step(number, *, conflict="", loss=0.5, cosines=True):
    pairs = {"forget·kl": 0.1, "forget·retain": -0.2, "kl·retain": 0.9}
    return StepRecord(
        step=number,
        lr=1e-5,
        losses={name: loss + i + 0.01 * number for i, name in enumerate(OBJECTIVES)},
        norms=dict.fromkeys(OBJECTIVES, 2.0),
        cosines=pairs,
        weights=dict.fromkeys(OBJECTIVES, 1.5),
        status="SOLVED",
        pareto_gap=0.7,
        changes={name: 1.0 if name == conflict else -1.0 for name in OBJECTIVES},
        conflicts={name: name == conflict for name in OBJECTIVES},
    )


def run(folder, *, steps=12, history=None, **changed):
    """Writes a run and returns its folder."""
    folder.mkdir(parents=True)
    facts = {
        "model": "/home/ann/models/tiny",
        "label": "tiny",
        "failure": None,
        "changes": [],
        "data": {
            "forget": {"source": "/home/ann/forget.jsonl", "rows": 12, "sha256": "ab" * 32},
            "retain": {"source": "locuslab/TOFU", "rows": 24, "sha256": "cd" * 32},
        },
        "settings": {"method": "mollm", "learning_rate": 1e-5, "seed": 42, "steps": steps},
        "versions": {"mollm": "0.1.0", "torch": "9.9"},
        "notes": [EVIL, "Rows were read from /home/ann/rows.jsonl."],
        "steps": steps,
        "resumed_at": 0,
        "skipped_steps": 0,
        "device": "a CPU",
        "processes": 1,
        "seconds": 75.4,
        "peak_memory_gib": 1.25,
        "evaluations": [{"step": 10, "eval_loss": 1.5, "eval_kl_loss": 0.25}],
        "replies": [
            {
                "set": role,
                "question": "Who wrote it?",
                "answer": EVIL,
                "before": "It was Ann Øre, of course.",
                "after": f"It was {EVIL}",
            }
            for role in ("forget", "retain")
        ],
        "commit": "abc",
        "finished": "now",
        "command": "mollm unlearn --config /home/ann/run.yaml --out=/home/ann/out",
    }
    write_run(facts | changed, folder)
    made = [step(n, conflict="kl" if n % 3 == 0 else "") for n in range(steps)]
    write_history(made if history is None else history, folder / "history.jsonl")
    return folder


def evaluated(folder, *, value=0.9, names=("forget_probability", "retain_probability", "mia_loss")):
    """Writes an evaluation into a folder."""
    estimates = {name: Estimate(value, value - 0.1, value + 0.1, 12) for name in names}
    made = (Record("forget", "Who?", "Ann.", "Bob.", {"nll": 1.0}),)
    Evaluation(made, estimates, {}).write(folder)


def about(folder, **settings):
    (folder / "about.json").write_text(json.dumps({"settings": settings}))


def audited(folder, *, verdict="WEAK", finished="2026-02-01T00:00:00+00:00", **changed):
    """Writes an audit of the run into its folder."""
    finding = {
        "name": "asked in other words",
        "verdict": verdict,
        "value": 0.2,
        "interval": [0.1, 0.3],
        "threshold": 0.1,
        "unit": "likelihood",
    }
    found = {
        "verdict": verdict,
        "findings": [finding],
        "notes": [EVIL],
        "missing": {},
        "about": {"finished": finished, "retain_only": None},
    }
    (folder / "audit").mkdir(exist_ok=True)
    (folder / "audit" / "audit.json").write_text(json.dumps(found | changed))
