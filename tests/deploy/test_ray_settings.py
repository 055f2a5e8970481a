"""The arguments of minisgl on Ray Serve; no Ray is needed for them."""

from __future__ import annotations

import pytest

from minisgl.deploy import ray_settings
from minisgl.errors import UserError


def test_settings_have_the_types_of_their_defaults_and_unknown_ones_are_refused() -> None:
    found = ray_settings.settings({"model": "m", "replicas": "3", "cpus": "2"})
    assert (found["replicas"], found["cpus"], found["max_replicas"]) == (3, 2.0, 0)
    with pytest.raises(UserError, match="replica: unknown; there are model, replicas"):
        ray_settings.settings({"replica": "3"})
    with pytest.raises(UserError, match="replicas=three: a number is expected"):
        ray_settings.settings({"replicas": "three"})
    with pytest.raises(UserError, match="at least 1"):
        ray_settings.settings({"replicas": "0"})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"replicas": "4", "max_replicas": "2"}, "max_replicas=2 is less than replicas=4"),
        ({"gpus": "-1"}, "gpus=-1: a number from 0"),
        ({"cpus": "nan"}, "cpus=nan: a number from 0"),
        ({"max_requests": "0"}, "max_requests must be at least 1"),
        ({"flags": "--model 'x"}, "flags .*: no flags as a shell would read them"),
        ({"flags": "--port=9"}, "flags: --port: Ray's proxy is what clients reach"),
        ({"flags": "--drain-seconds 3"}, "flags: --drain-seconds: write drain_seconds=N"),
        ({"flags": "--data-dir d", "max_replicas": "2"}, "flags: --data-dir: replicas on one node cannot share it"),
    ],
)
def test_what_would_be_ignored_or_break_a_replica_is_refused_by_its_name(args: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ray_settings.settings(args)
    assert ray_settings.settings({"flags": "--data-dir d"})


def test_a_server_on_cpus_has_as_many_threads_as_ray_reserves_for_it() -> None:
    flags = ray_settings.flags_of(ray_settings.settings({"model": "m", "cpus": "4", "flags": "--kv-tokens 512"}))
    assert flags == ["--model", "m", "--drain-seconds", "30", "--kv-tokens", "512", "--threads", "4"]
    assert "--threads" not in ray_settings.flags_of(ray_settings.settings({"gpus": "1"}))
    for flag in ("--threads 3", "--threads=3"):
        words = ray_settings.flags_of(ray_settings.settings({"flags": flag}))
        assert sum(word.startswith("--threads") for word in words) == 1
