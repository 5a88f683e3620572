"""Models that leave in a stock format, and models of a stock format that come in, compute the same under two versions
of ``transformers``: logits, a greedy continuation, text.

Weights are drawn so that logits have a spread near one. Two float32 computations in different orders then agree to
about 1e-5; 1e-4 is the bound that users are promised, taken absolutely.
"""

import shutil
from functools import cache

import pytest
import torch

from dsmoe_ray.artifact.hugging_face.export import export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.hugging_face.import_model import import_model, open_model
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine, load_model
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting, deployed_routing
from tests.fakes.other_transformers import VERSIONS, read_outcome, run_jobs
from tests.fakes.stock_models import EXPORTS, IMPORTS, VOCAB_SIZE, draw_weights, make_tokenizer
from tests.fakes.transformers_side import NUM_GENERATED, PROMPT_LENGTH

# Some ten seconds and more as a whole.
pytestmark = pytest.mark.slow

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
TOKENS = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(3))
TEXT = "def add(left):  # na\xefve, \u6f22\u5b57 , .\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the artifacts and their exports, by name."""
    base, tokenizer = tmp_path_factory.mktemp("exports"), make_tokenizer()
    made = {}
    for name, case in EXPORTS.items():
        directory = base / name
        save_artifact(
            directory / "artifact",
            model_config=case.config,
            tensors=draw_weights(case.config),
            tokenizer_json=tokenizer.to_json(),
            provenance={},
            # Only one model ends texts: the others must go on for as long as they are asked to.
            generation_config={"eos_token_id": tokenizer.end_of_text_id} if name == "mixtral" else {},
            chat_template=TEMPLATE,
            dtype=case.dtype,
        )
        artifact = load_artifact(directory / "artifact")
        plan = plan_export(artifact.model_config, case.kind, routing=case.routing)
        export_model(artifact, directory / "stock", plan, max_file_bytes=case.max_file_bytes)
        made[name] = directory
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(scope="module", params=VERSIONS)
def theirs(request, exported, saved):
    """Return what one version of transformers makes of all exports, and the models that it saved, by name."""
    version, jobs = request.param, {}
    out = saved / version
    for name, directory in exported.items():
        job = {"do": "load", "directory": str(directory / "stock"), "out": str(out / f"export-{name}"), "text": TEXT}
        jobs[name] = job | {"tokens": TOKENS.tolist()}
    for name, case in IMPORTS.items():
        job = {"do": "save", "directory": str(out / name), "out": str(out / f"import-{name}"), "config": case.config}
        jobs[name] = job | {"tokens": TOKENS.tolist(), "dtype": case.dtype, "options": case.options or {}}
    run_jobs(version, list(jobs.values()), out)
    return {name: (job, read_outcome(job)) for name, job in jobs.items()}


def run_forward(artifact):
    """Logits of the plain forward pass with the deployed routing."""
    model = load_model(artifact, dtype="float32")
    return model(TOKENS, routing=deployed_routing(model.config)).logits_BSV


def run_engine(artifact):
    """A greedy continuation by the engine."""
    request = GenerationRequest(
        prompt_ids=TOKENS[0, :PROMPT_LENGTH].tolist(), max_tokens=NUM_GENERATED, ignore_eos=True
    )
    config = EngineConfig(dtype="float32", numerics="exact", max_num_seqs=1)
    [outputs] = Generator(load_engine(artifact, config)).run([request])
    return torch.tensor([output.token.token_id for output in outputs])


def ours(artifact, routing=None):
    """Logits and a greedy continuation by the plain forward pass, without a cache."""
    model = load_model(artifact, dtype="float32")
    rules = deployed_routing(model.config) if routing is None else routing
    logits = model(TOKENS, routing=rules).logits_BSV
    sequence = TOKENS[:1, :PROMPT_LENGTH]
    end = artifact.generation_config.get("eos_token_id")
    while sequence.shape[1] < PROMPT_LENGTH + NUM_GENERATED and sequence[0, -1] != end:
        last = model(sequence, routing=rules, last_logits_only=True).logits_BSV[:, -1]
        sequence = torch.cat([sequence, last.argmax(-1, keepdim=True)], dim=1)
    return logits, sequence[0, PROMPT_LENGTH:]


def compare(found, outcome):
    logits, generated = found
    assert logits.std() > 0.3, "too small for the tolerance to mean anything"
    torch.testing.assert_close(logits, outcome["logits"], **TOLERANCE)
    assert generated.tolist() == outcome["generated"].tolist()
    assert len(set(generated.tolist())) >= 3, "a model that repeats itself proves little"


@pytest.fixture(scope="module")
def computed(exported):
    """Return what each exported model of ours computes, once for all versions."""

    @cache
    def compute(name):
        artifact = load_artifact(exported[name] / "artifact")
        rule = EXPORTS[name].routing
        if rule is None:
            return ours(artifact)
        attention = rule if artifact.model_config.attention.kind == "moa" else RoutingConfig()
        return ours(artifact, [LayerRouting(attention, rule)] * artifact.model_config.num_layers)

    return compute


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_model_computes_the_same(name, theirs, computed):
    _, outcome = theirs[name]
    assert not any(outcome[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compare(computed(name), outcome)


@pytest.mark.parametrize("name", EXPORTS)
def test_text_tokens_and_template_leave_with_the_model(name, theirs):
    _, outcome = theirs[name]
    tokenizer = make_tokenizer()
    assert outcome["ids"] == tokenizer.encode(TEXT).tolist()
    assert outcome["decoded"] == TEXT
    end = "<|endoftext|>" if name == "mixtral" else None
    assert (outcome["eos_token"], outcome["pad_token"], outcome["bos_token"]) == (end, end, None)
    assert outcome["chat"] == f"<user>hi{end or ''}"


@pytest.mark.parametrize("name", IMPORTS)
def test_an_imported_model_computes_the_same(name, theirs, tmp_path):
    job, outcome = theirs[name]
    source = shutil.copytree(job["directory"], tmp_path / "source")
    (source / "tokenizer.json").write_text(make_tokenizer().to_json())
    import_model(open_model(source), tmp_path / "artifact", provenance={})
    artifact = load_artifact(tmp_path / "artifact")
    compare((run_forward(artifact), run_engine(artifact)), outcome)


@pytest.mark.parametrize("kind", Format)
def test_export_then_import_gives_the_same_artifact(kind, exported, tmp_path):
    """Bit for bit, where there is no gate scale to fold into weights."""
    published = load_artifact(exported[kind.value] / "artifact")
    config = with_gate_scale_one(published.model_config)
    original = tmp_path / "original"
    save_artifact(
        original,
        model_config=config,
        tensors=published.load_state_dict().items(),
        tokenizer_json=published.tokenizer_json,
        provenance={},
        generation_config={"eos_token_id": 0, "temperature": 0.7},
        chat_template=TEMPLATE,
    )
    first = load_artifact(original)
    export_model(first, tmp_path / "stock", plan_export(config, kind))
    import_model(open_model(tmp_path / "stock"), tmp_path / "back", provenance={})
    second = load_artifact(tmp_path / "back")
    assert second.model_config == first.model_config
    assert second.manifest.tensors == first.manifest.tensors
    assert second.generation_config == first.generation_config
    assert second.tokenizer_json == first.tokenizer_json and second.chat_template == TEMPLATE


def with_gate_scale_one(config):
    values = config.model_dump()
    for part in ("attention", "ffn"):
        if "router" in values[part]:
            values[part]["router"]["gate_scale"] = 1.0
    return ModelConfig.model_validate(values)
