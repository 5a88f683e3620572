"""lm-evaluation-harness on one artifact, run as a process of its own, since it reads its settings when it is imported.

The same tasks three times: on our engine, on the exported model under ``transformers`` by the harness's own adapter,
and on the plain forward pass of the training side.
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.evaluation.lm_eval_adapter import EngineModel
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine, load_model
from dsmoe_ray.model.layer_routing import deployed_routing
from tests.fakes.lm_eval_tasks_run import evaluate


class ForwardModel(EngineModel):
    """The training side's model: one forward pass over each whole text, no engine. Texts become tokens as above."""

    def __init__(self, generator, model):
        super().__init__(generator)
        self.model, self.rules = model, deployed_routing(model.config)

    def logprobs(self, tokens):
        return self.model(torch.tensor([tokens]), routing=self.rules).logits_BSV[0].log_softmax(-1)

    def _loglikelihood_tokens(self, requests, **kwargs):
        scores = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation]
            logprobs_CV = self.logprobs(tokens[:-1])[-len(continuation) :]
            targets = torch.tensor(continuation)
            total = logprobs_CV.gather(1, targets[:, None]).sum().item()
            scores.append((total, bool((logprobs_CV.argmax(-1) == targets).all())))
        return scores

    def generate_until(self, requests, disable_tqdm=False):
        return [self.go_on(*request.args) for request in requests]

    def go_on(self, context, gen_kwargs):
        wanted = normalize_gen_kwargs(gen_kwargs)
        prompt = self.tok_encode(context)
        tokens, text = list(prompt), ""
        for _ in range(wanted["max_gen_toks"]):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
            if tokens[-1] == self.eot_token_id:
                break
            text = self._generator.engine.tokenizer.decode(tokens)[len(context) :]
            found = [text.index(stop) for stop in wanted["until"] if stop in text]
            if found:
                return text[: min(found)]
        return text


def main(artifact_path, export_path, out):
    torch.set_num_threads(1)
    artifact = load_artifact(Path(artifact_path))
    generator = Generator(load_engine(artifact))
    ours = EngineModel(generator)
    exported = HFLM(export_path, device="cpu", dtype="float32", batch_size=4, max_length=ours.max_length)
    sides = {"engine": ours, "exported": exported, "forward": ForwardModel(generator, load_model(artifact))}
    Path(out).write_text(json.dumps({name: evaluate(model) for name, model in sides.items()}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
