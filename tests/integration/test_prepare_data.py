"""Preparation of data on a real local Ray: result, determinism, skipping, and mistakes of a person."""

import fcntl
import hashlib
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsmoe_ray.data import prepare
from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.data.packing import pack_documents, token_shards_from_text
from dsmoe_ray.data.prepare import prepare_data
from dsmoe_ray.data.shard_index import verify_token_shards
from dsmoe_ray.data.sources import is_held_out
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from dsmoe_ray.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

VOCAB_SIZE = 300


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    (directory / "sub").mkdir(parents=True)
    for number in range(30):
        name = f"sub/{number:02d}.txt" if number % 2 else f"{number:02d}.txt"
        (directory / name).write_text(f"document {number}: " + "word " * (number * 7 % 40) + "\n")
    return directory


def make_config(path: Path, **values) -> DataConfig:
    return DataConfig(**{"paths": [str(path)], "held_out_ratio": 0.2, **values})


def read_stream(directory: Path) -> np.ndarray:
    shards = TokenShards.open(directory)
    return np.append(
        np.concatenate([shards.read_sample(index, 1).tokens[:1] for index in range(shards.num_samples(1))]),
        shards.read_sample(shards.num_samples(1) - 1, 1).tokens[1:],
    )


def digest_tree(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_text_becomes_verified_shards_in_the_order_of_names_with_held_out_files_apart(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MIN_UNIT_BYTES", 200)
    progress: list[tuple[str, int, int]] = []
    prepared = prepare_data(
        make_config(corpus, shard_tokens=500),
        vocab_size=VOCAB_SIZE,
        run_dir=tmp_path / "run",
        on_progress=lambda *news: progress.append(news),
    )
    assert prepared.directory == tmp_path / "run" / "data"
    assert not prepared.skipped
    tokenizer = load_tokenizer(prepared.tokenizer_path, vocab_size=VOCAB_SIZE)
    assert tokenizer.vocab_size == VOCAB_SIZE

    names = sorted(str(path.relative_to(corpus)) for path in corpus.rglob("*.txt"))
    for directory, held_out, num_tokens in (
        (prepared.train_dir, False, prepared.num_train_tokens),
        (prepared.held_out_dir, True, prepared.num_held_out_tokens),
    ):
        verify_token_shards(directory)
        chosen = [name for name in names if is_held_out(name.encode(), 0.2) == held_out]
        expected = np.concatenate([[*tokenizer.encode((corpus / name).read_text()), 0] for name in chosen])
        np.testing.assert_array_equal(read_stream(directory), expected)
        assert num_tokens == len(expected)
        assert TokenShards.open(directory).num_documents == len(chosen) > 0
    assert len(list(prepared.train_dir.glob("tokens-*.bin"))) > 1

    phases = [phase for index, (phase, _, _) in enumerate(progress) if index == 0 or progress[index - 1][0] != phase]
    assert phases == ["train tokenizer", "tokenize", "write"]
    assert len([news for news in progress if news[0] == "tokenize"]) > 5
    assert all(done == total for phase, done, total in [progress[-1], *_last_of_each(progress)])
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["data"]


def _last_of_each(progress):
    return {phase: (phase, done, total) for phase, done, total in progress}.values()


def test_the_result_does_not_depend_on_how_many_units_run_at_once_or_in_which_order(corpus, tmp_path, monkeypatch):
    digests = []
    for unit_bytes in (50, 700, 1 << 20):
        monkeypatch.setattr(prepare, "_MIN_UNIT_BYTES", unit_bytes)
        prepared = prepare_data(make_config(corpus), vocab_size=VOCAB_SIZE, run_dir=tmp_path / str(unit_bytes))
        digests.append(digest_tree(prepared.directory))
    assert len(digests[0]) == 7
    assert digests[0] == digests[1] == digests[2]


def test_preparation_is_skipped_until_a_source_the_config_or_the_result_changes(corpus, tmp_path, caplog):
    def run(vocab_size: int = VOCAB_SIZE, **values) -> bool:
        return prepare_data(make_config(corpus, **values), vocab_size=vocab_size, run_dir=tmp_path / "run").skipped

    assert not run()
    assert run()
    assert run(document_boundaries=True)
    assert not run(shard_tokens=100)
    assert not run(vocab_size=VOCAB_SIZE + 1, shard_tokens=100)
    (corpus / "00.txt").write_text("another text")
    assert not run()
    assert run()
    damaged = next((tmp_path / "run/data/train").glob("tokens-*.bin"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        assert not run()
    assert "damaged and is made again" in caplog.text and damaged.name in caplog.text
    verify_token_shards(tmp_path / "run/data/train")


def test_bad_rows_are_counted_reported_logged_once_and_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prepare, "_MIN_UNIT_BYTES", 300)
    rows = [json.dumps({"text": f"good row {number}"}) for number in range(60)]
    rows[10], rows[20], rows[21], rows[30] = "{broken", '{"text": null}', '{"text": 3}', '{"body": "x"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = make_config(tmp_path / "rows.jsonl", format="jsonl")
    with caplog.at_level(logging.WARNING, logger="dsmoe_ray"):
        prepared = prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    counts = {"not valid JSON": 1, "field is null": 1, "field is not a string": 1, "field missing": 1}
    assert prepared.bad_rows.counts == counts
    assert prepared.num_train_documents + prepared.num_held_out_documents == 56
    assert json.loads(prepared.report_path.read_text())["bad_rows"]["counts"] == counts
    assert prepared.bad_rows.examples["field is null"] == [f"{tmp_path / 'rows.jsonl'}:21"]
    assert len([record for record in caplog.records if "left out 4 bad rows" in record.getMessage()]) == 1
    again = prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    assert again.skipped and again.bad_rows == prepared.bad_rows


def test_parquet_is_tokenized_with_a_given_tokenizer(tmp_path):
    given = train_tokenizer(["one two three"], vocab_size=260)
    (tmp_path / "given.json").write_text(given.to_json())
    texts = [f"one two three {number}" for number in range(40)]
    pq.write_table(pa.table({"body": texts}), tmp_path / "rows.parquet", row_group_size=7)
    config = make_config(
        tmp_path / "rows.parquet", format="parquet", field="body", tokenizer=str(tmp_path / "given.json")
    )
    prepared = prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    assert load_tokenizer(prepared.tokenizer_path).digest == given.digest
    kept = [text for text in texts if not is_held_out(text.encode(), 0.2)]
    expected = np.concatenate([[*given.encode(text), 0] for text in kept])
    np.testing.assert_array_equal(read_stream(prepared.train_dir), expected)


def test_ray_and_the_way_without_it_make_the_same_tokens(corpus, tmp_path):
    prepared = prepare_data(make_config(corpus), vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    shards = token_shards_from_text(make_config(corpus), tokenizer=tokenizer, vocab_size=VOCAB_SIZE)
    assert shards.num_tokens == prepared.num_train_tokens + prepared.num_held_out_tokens
    assert pack_documents([], tokenizer).tokens.size == 0


def check_refused(tmp_path: Path, config: DataConfig, match: str, *, vocab_size: int = VOCAB_SIZE) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(DataError, match=match) as caught:
        prepare_data(config, vocab_size=vocab_size, run_dir=run_dir)
    assert "Traceback" not in str(caught.value)
    assert not run_dir.exists() or [path for path in run_dir.iterdir() if path.is_dir()] == []


def test_a_corpus_without_a_document_is_refused_with_the_reasons(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "id": 2}\n' * 5)
    config = make_config(tmp_path / "rows.jsonl", format="jsonl")
    check_refused(
        tmp_path, config, r"(?s)no document.*all 5 rows are bad.*5 x field missing.*it has body, id.*data.field"
    )


def test_a_corpus_without_a_row_is_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], type=pa.string())}), tmp_path / "rows.parquet")
    check_refused(
        tmp_path, make_config(tmp_path / "rows.parquet", format="parquet"), "no document.*its files are empty"
    )


def test_a_corpus_with_nothing_on_one_side_is_refused_with_the_ratio(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    check_refused(
        tmp_path, make_config(tmp_path / "one.txt", held_out_ratio=0.001), r"none of the 1 documents is held out"
    )
    check_refused(tmp_path, make_config(tmp_path / "one.txt", held_out_ratio=0.999), r"all 1 documents are held out")


def test_a_missing_path_column_or_tokenizer_and_one_too_large_are_refused(corpus, tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "rows.parquet")
    (tmp_path / "large.json").write_text(train_tokenizer([], vocab_size=VOCAB_SIZE + 1).to_json())
    check_refused(tmp_path, make_config(tmp_path / "absent"), "no file or directory")
    check_refused(
        tmp_path, make_config(tmp_path / "rows.parquet", format="parquet", field="b"), "no column 'b'; it has text"
    )
    check_refused(tmp_path, make_config(corpus, tokenizer=str(tmp_path / "none.json")), "cannot read the tokenizer")
    check_refused(tmp_path, make_config(corpus, tokenizer=str(tmp_path / "large.json")), "ids up to 300")
    check_refused(tmp_path, make_config(corpus), "too small", vocab_size=100)


def test_a_directory_that_holds_something_else_is_never_replaced(corpus, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.tex").write_text("years of work")
    config = make_config(corpus, prepared_dir=str(tmp_path / "precious"))
    with pytest.raises(DataError, match="holds something else than prepared data"):
        prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    assert (tmp_path / "precious/thesis.tex").read_text() == "years of work"


def test_a_file_that_only_this_node_sees_is_an_error_and_not_a_bad_row(corpus, tmp_path, monkeypatch):
    real_plan = prepare.plan_units

    def plan_then_lose_a_file(*args, **kwargs):
        units = real_plan(*args, **kwargs)
        (corpus / "02.txt").unlink()
        return units

    monkeypatch.setattr(prepare, "plan_units", plan_then_lose_a_file)
    check_refused(tmp_path, make_config(corpus), r"02.txt is not there on node .*all nodes see")


def test_an_interrupted_preparation_leaves_nothing_and_keeps_the_older_result(corpus, tmp_path):
    older = prepare_data(make_config(corpus), vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    before = digest_tree(older.directory)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(make_config(corpus), vocab_size=VOCAB_SIZE + 5, run_dir=tmp_path / "run", on_progress=interrupt)
    assert digest_tree(older.directory) == before
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["data"]


def test_a_second_run_waits_for_the_first_and_then_has_nothing_to_do(corpus, tmp_path):
    config = make_config(corpus)
    prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    results = []

    def run() -> None:
        results.append(prepare_data(config, vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run"))

    with (tmp_path / "run/.data.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=run)
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive() and not results
    second.join(timeout=30)
    assert results[0].skipped


def test_ray_data_says_nothing_of_its_own(corpus, tmp_path, capfd):
    prepare_data(make_config(corpus), vocab_size=VOCAB_SIZE, run_dir=tmp_path / "run")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Dataset" not in captured.err and "rogress" not in captured.err
