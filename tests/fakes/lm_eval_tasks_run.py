"""Our tasks for lm-evaluation-harness, run on one model of it."""

from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).with_name("lm_eval_tasks")
TASK_NAMES = ("dsmoe_choice", "dsmoe_completion", "dsmoe_perplexity")


def evaluate(model):
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=list(TASK_NAMES), task_manager=tasks, bootstrap_iters=0)
    samples = {
        name: [sample["filtered_resps"] for sample in sorted(found["samples"][name], key=lambda one: one["doc_id"])]
        for name in TASK_NAMES
    }
    return {"results": found["results"], "samples": samples}
