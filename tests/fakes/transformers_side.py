"""The other side of interchange, run as a process of its own so that each version of ``transformers`` can play it.

Reads jobs (a JSON list) from a file and does them one after another. ``load`` takes a model directory; ``save`` first
makes a model with drawn weights there. Either way it writes down what the model does: logits of some tokens, a greedy
continuation, and what the tokenizer makes of a text.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_GENERATED, PROMPT_LENGTH = 64, 8


def main(jobs_path: str) -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs_path).read_text()):
        if job["do"] == "save":
            save(job)
        describe(job)


def save(job) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(**job["config"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Norms near one; the formats' biases are zero, as in models that we can hold.
                parameter.copy_(torch.zeros_like(noise) if name.endswith("bias") else 1.0 + 0.1 * noise)
            else:
                # Activations near one, so that absolute tolerances mean something.
                parameter.copy_(noise * (0.15 if "embed" in name else max(parameter.shape[-1], 1) ** -0.5))
    model.to(getattr(torch, job["dtype"])).save_pretrained(job["directory"], **job["options"])


def describe(job) -> None:
    import transformers

    directory = Path(job["directory"])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, trust_remote_code=False, dtype=torch.float32
    )
    tokens = torch.tensor(job["tokens"])
    with torch.no_grad():
        logits = model(tokens).logits
        prompt = tokens[:1, :PROMPT_LENGTH]
        # The longest sequence may be set in the model's own defaults; the count of new tokens goes first.
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_GENERATED
        )
    out = Path(job["out"])
    save_file(
        {"logits": logits.contiguous(), "generated": generated[0, PROMPT_LENGTH:].contiguous()}, f"{out}.safetensors"
    )
    found = {"version": transformers.__version__, **{key: sorted(map(str, info[key])) for key in info}}
    if "text" in job:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        ids = tokenizer(job["text"])["input_ids"]
        found |= {"ids": ids, "decoded": tokenizer.decode(ids)}
        found |= {name: getattr(tokenizer, name) for name in ("eos_token", "bos_token", "pad_token")}
        if tokenizer.chat_template is not None:
            found["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    Path(f"{out}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
