"""The examples for Kubernetes and AWS Batch: right by the schemas of those services, and by what our commands read."""

import json
from importlib import resources

import botocore.session
import kubernetes_validate
import pytest
import typer.main
import yaml
from botocore.validate import ParamValidator

from launch.cli import app
from launch.tasks import task_from_environment
from pipelines.recipes import load_preparation

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
