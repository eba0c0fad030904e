"""The examples for Kubernetes, Kubeflow and AWS Batch: right by the schemas of those services, and by what our commands read."""

import json
import re
from importlib import resources

import botocore.session
import kubernetes_validate
import pytest
import typer.main
import yaml
from botocore.validate import ParamValidator
from kubeflow.training import models
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import parse_args

from launch.cli import app
from launch.tasks import task_from_environment
from pipelines.recipes import load_preparation, load_recipe

TEMPLATES = resources.files("launch") / "templates"
KUBERNETES = ("1.30", kubernetes_validate.latest_version())


def load(name: str) -> dict:
    """A template as nested values (JSON is YAML too)."""
    return yaml.safe_load((TEMPLATES / name).read_text())


def parse(arguments: list[str]) -> dict:
    """Parameters of the prep command that the arguments call; raises with the command's own message."""
    command = typer.main.get_command(app).commands["prep"].commands[arguments[1]]
    return command.make_context(command.name, arguments[2:]).params


def containers(job: dict) -> list[dict]:
    pod = job["spec"]["template"]["spec"]
    return pod.get("initContainers", []) + pod["containers"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", ["kubernetes_shards.yaml", "kubernetes_index.yaml"])
def test_kubernetes_accepts_the_jobs(name, version):
    kubernetes_validate.validate(load(name), version, strict=True)


def test_a_wrong_field_would_be_found():
    job = load("kubernetes_shards.yaml")
    job["spec"]["completion_mode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completion_mode"):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


def test_every_index_of_the_kubernetes_job_is_a_task():
    spec = load("kubernetes_shards.yaml")["spec"]
    assert spec["completionMode"] == "Indexed"
    given = {variable["name"]: variable["value"] for variable in containers({"spec": spec})[0]["env"]}
    tasks = [task_from_environment(given | {"JOB_COMPLETION_INDEX": str(index)}) for index in range(spec["completions"])]
    assert tasks == [(index, spec["completions"]) for index in range(spec["completions"])]


def test_the_kubernetes_jobs_call_our_commands_on_the_same_data():
    cut, index, verify = (each["args"] for name in ("shards", "index") for each in containers(load(f"kubernetes_{name}.yaml")))
    manifest, shards = "s3://my-bucket/manifest.parquet", "s3://my-bucket/shards"
    assert cut[:4] == ["prep", "shards", manifest, shards]
    assert index == ["prep", "index", shards] and verify == ["prep", "verify", shards, "--manifest", manifest]
    assert parse(index) and parse(verify)
    assert_cuts_8_seconds(parse(cut))


@pytest.mark.parametrize(("name", "operation"), [("definition", "RegisterJobDefinition"), ("shards", "SubmitJob")])
def test_aws_batch_accepts_the_requests(name, operation):
    shape = botocore.session.get_session().get_service_model("batch").operation_model(operation).input_shape
    assert not ParamValidator().validate(json.loads((TEMPLATES / f"aws_batch_{name}.json").read_text()), shape).has_errors()


def test_the_aws_batch_array_calls_our_command():
    definition, array = load("aws_batch_definition.json"), load("aws_batch_shards.json")
    assert array["jobDefinition"] == definition["jobDefinitionName"]
    words = definition["containerProperties"]["command"]
    cut = [definition["parameters"][word.removeprefix("Ref::")] if word.startswith("Ref::") else word for word in words]
    assert cut[:4] == ["prep", "shards", "s3://my-bucket/manifest.parquet", "s3://my-bucket/shards"]
    assert_cuts_8_seconds(parse(cut))


def assert_cuts_8_seconds(parameters: dict) -> None:
    """The environment tells the task, and the settings are such as we know."""
    assert parameters["task"] == "auto" and parameters["workers"] == 8
    assert load_preparation(None, parameters["overrides"]).format.max_seconds == 8


PYTORCHJOB = "pytorchjob.yaml"


def problems(value, kind: str, path: str = "job") -> list[str]:
    """Where a value differs from a type of Kubeflow's own Python models; Kubernetes' own types are left to its validator."""
    if inner := re.fullmatch(r"(?:list\[|dict\(str, )(.+)[\])]", kind):
        each = value.items() if kind.startswith("dict") else enumerate(value)
        return [problem for name, item in each for problem in problems(item, inner[1], f"{path}.{name}")]
    if kind in ("str", "int", "bool"):
        return [] if type(value).__name__ == kind else [f"{path} is {value!r}, not {kind}"]
    if not kind.startswith("KubeflowOrg"):
        return []
    model = getattr(models, kind)
    names = {external: model.openapi_types[own] for own, external in model.attribute_map.items()}
    unknown = [f"{path}.{name} is unknown" for name in value.keys() - names.keys()]
    return unknown + [p for name, item in value.items() if name in names for p in problems(item, names[name], f"{path}.{name}")]


def worker(job: dict) -> dict:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def test_kubeflow_accepts_the_pytorchjob():
    job = load(PYTORCHJOB)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert problems(job, "KubeflowOrgV1PyTorchJob") == []


@pytest.mark.parametrize("wrong", [{"elastic_policy": {}}, {"elasticPolicy": {"minReplicas": "2"}}, {"elasticPolicy": {"nodes": 2}}])
def test_a_wrong_field_of_the_pytorchjob_would_be_found(wrong):
    job = load(PYTORCHJOB)
    job["spec"] |= wrong
    assert len(problems(job, "KubeflowOrgV1PyTorchJob")) == 1


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_the_pods_of_the_pytorchjob(version):
    pod = {"apiVersion": "v1", "kind": "Pod", **worker(load(PYTORCHJOB))["template"]}
    pod["metadata"] |= {"name": "foleyscale-train-worker-0"}
    kubernetes_validate.validate(pod, version, strict=True)


def test_torchrun_understands_what_the_operator_tells_it(monkeypatch):
    """The operator sets these variables from the elastic policy (pkg/controller.v1/pytorch/elastic.go of kubeflow/training-operator)."""
    job = load(PYTORCHJOB)
    policy, container = job["spec"]["elasticPolicy"], worker(job)["template"]["spec"]["containers"][0]
    port = container["ports"][0]["containerPort"]
    for name, value in {
        "NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}", "MAX_RESTARTS": policy["maxRestarts"], "RDZV_ID": policy["rdzvId"],
        "RDZV_BACKEND": policy["rdzvBackend"], "RDZV_ENDPOINT": f"{job['metadata']['name']}-worker-0:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PET_{name}", str(value))
    started = parse_args([*container["command"][1:], *container["args"]])
    assert (started.nnodes, started.nproc_per_node, started.max_restarts) == ("2:2", "8", 10)
    assert (started.rdzv_backend, started.rdzv_endpoint, started.rdzv_id) == ("c10d", "foleyscale-train-worker-0:23456", "foleyscale-train")
    assert (started.module, started.training_script) == (True, "launch.cli")
    assert policy["minReplicas"] == policy["maxReplicas"] == worker(job)["replicas"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert LaunchConfig(min_nodes=2, max_nodes=2, nproc_per_node=8).shutdown_timeout == 600
    assert worker(job)["template"]["spec"]["terminationGracePeriodSeconds"] > 600, "torchrun must be the first to lose patience"


def test_the_pytorchjob_trains_with_a_batch_that_its_gpus_can_share():
    job = load(PYTORCHJOB)
    container = worker(job)["template"]["spec"]["containers"][0]
    command, recipe, *overrides = container["args"]
    resolved = load_recipe(recipe, overrides)
    assert command == "run" and resolved.data == "s3://my-bucket/shards" and str(resolved.out) == "/runs"
    processes = worker(job)["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    for stage in ("autoencoder", "contrastive", "generative", "preference"):
        train = getattr(resolved, stage).train
        assert train.batch_size % (processes * train.accumulation) == 0, stage


def test_the_pytorchjob_asks_the_doctor_first():
    pod = worker(load(PYTORCHJOB))["template"]["spec"]
    name, *arguments = pod["initContainers"][0]["args"]
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, arguments).params["url"] == "s3://my-bucket/shards"
    assert pod["initContainers"][0]["resources"] == pod["containers"][0]["resources"]
