"""Each finding from conditions set by hand; no check may need the machine to be good."""

import shutil
from collections import namedtuple

import pytest

from dsmoe_ray.operations import doctor

Usage = namedtuple("Usage", "total used free")


def test_every_check_reports_something_about_this_machine(tmp_path):
    findings = doctor.examine_machine(tmp_path)
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.found for finding in findings)
    assert all(finding.advice for finding in findings if finding.status != "ok")


@pytest.mark.parametrize(
    ("check", "version", "status"),
    [
        pytest.param(doctor.check_torch, None, "failure", id="no torch"),
        pytest.param(doctor.check_torch, "2.10.1", "failure", id="old torch"),
        pytest.param(doctor.check_torch, "2.11.0+cu130", "ok", id="torch"),
        pytest.param(doctor.check_ray, None, "warning", id="no ray"),
        pytest.param(doctor.check_ray, "2.61.0", "warning", id="other ray"),
        pytest.param(doctor.check_ray, "2.60.3", "ok", id="ray"),
    ],
)
def test_versions_are_judged(monkeypatch, check, version, status):
    monkeypatch.setattr(doctor, "_installed_version", lambda _: version)
    assert check().status == status


@pytest.mark.parametrize(("threads", "status"), [("64", "warning"), ("2", "ok"), ("junk", "ok")])
def test_more_threads_than_cores_is_a_warning(monkeypatch, threads, status):
    monkeypatch.setattr(doctor, "_usable_cpus", lambda: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert doctor.check_cpus().status == status


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "status"), [(1, 100, "warning"), (40, 1000, "warning"), (40, 100, "ok")]
)
def test_little_or_nearly_full_disk_is_a_warning(monkeypatch, tmp_path, free_gib, total_gib, status):
    usage = Usage(total_gib * doctor.GIB, (total_gib - free_gib) * doctor.GIB, free_gib * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert doctor.check_disk(tmp_path).status == status


@pytest.mark.parametrize(("available_gib", "status"), [(1, "warning"), (8, "ok")])
def test_little_free_memory_is_a_warning(monkeypatch, available_gib, status):
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (16 * doctor.GIB, available_gib * doctor.GIB))
    assert doctor.check_memory().status == status


def test_a_missing_compiler_is_a_warning(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.check_compiler().status == "warning"
