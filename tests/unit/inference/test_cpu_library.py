import ctypes
import shutil
import stat
from pathlib import Path

import pytest

from dsmoe_ray.inference import cpu_library
from dsmoe_ray.inference.cpu_library import KernelsUnavailableError, load_kernels
from tests.fakes.runner_kinds import with_kernels


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that notes each of its runs, and copies the kernels that are built already."""
    return FakeCompiler(tmp_path, monkeypatch, built=with_kernels("cpu native", load_kernels)._name)


class FakeCompiler:
    def __init__(self, directory, monkeypatch, *, built):
        self.path, self._runs = directory / "compiler-of-the-test", directory / "runs"
        # The name of the output follows "-o".
        self.write(f'while [ "$1" != -o ]; do shift; done; cp "{built}" "$2"')
        monkeypatch.setenv("CXX", str(self.path))
        monkeypatch.setenv("DSMOE_CPU_KERNELS", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))

    def write(self, body):
        self.path.write_text(f'#!/bin/sh\necho run >> "{self._runs}"\n{body}\n')
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def num_runs(self):
        return self._runs.read_text().count("run") if self._runs.exists() else 0


def built_names(cache):
    return {path.name for path in (Path(cache) / "dsmoe_ray").iterdir()}


def test_what_was_built_is_kept_for_other_processes(compiler, tmp_path):
    assert load_kernels() is load_kernels()
    [name] = built_names(tmp_path / "cache")
    assert name.endswith(".so")
    # Where another process would look: without what this one remembers.
    cpu_library._load_once.cache_clear()
    load_kernels()
    assert compiler.num_runs == 1


@pytest.mark.parametrize("place", ["/proc/nothing", "a file/below"])
def test_without_a_cache_the_kernels_are_built_for_this_process(compiler, tmp_path, monkeypatch, caplog, place):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    library = load_kernels()
    assert isinstance(library, ctypes.CDLL) and load_kernels() is library
    assert compiler.num_runs == 1
    assert "XDG_CACHE_HOME" in caplog.text


def test_a_user_without_a_home_gets_kernels_for_this_process(compiler, monkeypatch, caplog):
    def find_no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", find_no_home)
    assert isinstance(load_kernels(), ctypes.CDLL)
    assert "no home directory is known" in caplog.text


def test_a_machine_without_any_place_to_write_has_no_kernels(compiler, monkeypatch):
    def refuse(*args, **options):
        raise OSError("Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    cpu_library._make_own_directory.cache_clear()
    with pytest.raises(KernelsUnavailableError, match="Read-only file system"):
        load_kernels()


def test_a_compiler_that_fails_is_told_with_its_message_and_not_run_again(compiler):
    compiler.write('echo "error: no such instruction" >&2; exit 1')
    for _ in range(2):
        with pytest.raises(
            KernelsUnavailableError, match=rf"{compiler.path} failed on the CPU kernels: error: no such instruction"
        ):
            load_kernels()
    assert compiler.num_runs == 1


def test_a_compiler_that_writes_no_library_is_told(compiler):
    compiler.write('while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    with pytest.raises(KernelsUnavailableError, match=r"cannot be built or loaded: .*cpu_kernels-"):
        load_kernels()


def test_a_cxx_that_cannot_be_run_is_named(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(KernelsUnavailableError, match="CXX=no-such-compiler -v names no program"):
        load_kernels()


def test_a_cxx_may_be_a_command_of_several_words(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"env {compiler.path}")
    load_kernels()
    assert compiler.num_runs == 1


def test_a_machine_without_a_compiler_is_told_which_are_looked_for(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelsUnavailableError, match=r"none of g\+\+, c\+\+, clang\+\+ is installed"):
        load_kernels()


def test_kernels_that_are_switched_off_are_not_built(compiler, monkeypatch):
    monkeypatch.setenv("DSMOE_CPU_KERNELS", "off")
    with pytest.raises(KernelsUnavailableError, match="switched off"):
        load_kernels()
    assert compiler.num_runs == 0


def test_other_flags_or_sources_are_another_build(compiler, tmp_path, monkeypatch):
    names = []
    for step in range(3):
        cache = tmp_path / f"cache {step}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        load_kernels()
        load_kernels("portable")
        names.append(built_names(cache))
        if step == 1:
            sources = shutil.copytree(cpu_library.SOURCES, tmp_path / "sources")
            (sources / "dot.h").write_text((sources / "dot.h").read_text() + "\n")
            monkeypatch.setattr(cpu_library, "SOURCES", sources)
    assert len(names[0]) == 2
    assert names[0] == names[1]
    assert names[0].isdisjoint(names[2])
    assert compiler.num_runs == 6


@pytest.mark.parametrize("name", ["BLOCK_SIZE", "MAX_STREAMED", "_SUM_BLOCK"])
def test_constants_that_differ_from_those_of_the_kernels_are_found(compiler, monkeypatch, name):
    monkeypatch.setattr(cpu_library, name, 8)
    with pytest.raises(AssertionError, match="structures or constants differ"):
        load_kernels()
