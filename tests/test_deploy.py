"""The deployment files against the package they deploy, and against the fields that KubeRay has."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from aisp_dist import placement
from aisp_dist.config import load
from jobs import cli, submit

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "configs" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIG_MAP, JOB = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()

# The JSON names in KubeRay's ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go and in core/v1 of
# Kubernetes, as far as a job needs them. The API server silently drops unknown fields.
JOB_SPEC = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER_SPEC = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template", "resources", "labels"}
WORKERS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "rayStartParams",
    "scaleStrategy", "suspend", "template", "resources", "labels",
}  # fmt: skip
POD = {
    "affinity", "containers", "initContainers", "nodeSelector", "priorityClassName", "runtimeClassName",
    "securityContext", "serviceAccountName", "terminationGracePeriodSeconds", "tolerations", "volumes",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "name", "ports", "resources",
    "securityContext", "volumeMounts",
}  # fmt: skip


def groups() -> list[dict]:
    return [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]


def containers() -> list[dict]:
    return [container for group in groups() for container in group["template"]["spec"]["containers"]]


def test_kuberay_knows_every_field():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert JOB["spec"].keys() <= JOB_SPEC and CLUSTER.keys() <= CLUSTER_SPEC
    assert JOB["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert JOB["spec"]["submitterConfig"].keys() <= {"backoffLimit"}
    assert CLUSTER["authOptions"] == {"mode": "token"} and Version(CLUSTER["rayVersion"]) >= Version("2.52.0")
    assert CLUSTER["headGroupSpec"].keys() <= HEAD
    assert all(group.keys() <= WORKERS for group in CLUSTER["workerGroupSpecs"])
    for group in groups():
        assert group["template"]["spec"].keys() <= POD
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(container.keys() <= CONTAINER for container in containers())


def test_the_job_is_a_command_of_this_package_with_a_valid_configuration():
    python, module_flag, module, config, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert (python, module_flag) == ("python", "-m")
    package, verb = module.split(".")
    assert package == "jobs" and verb in cli.VERBS and not flags
    mounts = [{m["name"]: m["mountPath"] for m in c["volumeMounts"]} for c in containers()]
    volumes = [{v["name"]: v for v in group["template"]["spec"]["volumes"]} for group in groups()]
    for mounted, there in zip(mounts, volumes, strict=True):
        assert mounted.keys() == there.keys()
        assert there["config"]["configMap"]["name"] == CONFIG_MAP["metadata"]["name"]
        assert config in {f"{mounted['config']}/{name}" for name in CONFIG_MAP["data"]}
        assert run().output.startswith(f"{mounted['data']}/")
        assert run().prompts.source.startswith(f"{mounted['data']}/")
        assert "persistentVolumeClaim" in there["data"]  # outlives the cluster: backoffLimit resumes from it


def run():
    return load.check(yaml.safe_load(CONFIG_MAP["data"]["run.yaml"]))


def test_its_actors_fit_its_workers_group_by_group():
    head = CLUSTER["headGroupSpec"]["rayStartParams"]
    assert head == {"num-cpus": "0", "num-gpus": "0"}
    there: list[dict[str, float]] = []
    for group in CLUSTER["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        there += [{"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}] * group["replicas"]
    plan = placement.plan(run(), there)
    assert plan.idle == 0 and all(group.num_gpus in (0, 1) for group in plan.groups), "a whole GPU for each model"
    with pytest.raises(ValueError, match="GPU"):
        placement.plan(run(), there[1:])


def test_there_is_time_for_the_last_flush():
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"]) == {"env_vars": submit.ENVIRONMENT}
    wait = float(submit.ENVIRONMENT["RAY_JOB_STOP_WAIT_TIME_S"])
    assert all(group["template"]["spec"]["terminationGracePeriodSeconds"] > wait for group in groups())
    assert JOB["spec"]["backoffLimit"] > 0 and JOB["spec"]["shutdownAfterJobFinishes"]


def test_no_secret_is_in_the_files_and_no_pod_is_root():
    for container in containers():
        secret = {e["name"]: e for e in container["env"]}["HF_TOKEN"]
        assert secret.keys() == {"name", "valueFrom"} and "secretKeyRef" in secret["valueFrom"]
    assert all(group["template"]["spec"]["securityContext"]["runAsNonRoot"] for group in groups())
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M)[-1] == "ray"
    text = DOCKERFILE + (DEPLOY / "rayjob.yaml").read_text()
    assert not re.search(r"hf_\w{8}|AKIA\w{8}|(ARG|ENV) \S*(TOKEN|SECRET|KEY|PASSWORD)", text)
    assert "TOKEN" not in JOB["spec"]["runtimeEnvYAML"]


def test_image_and_package_agree():
    version = re.search(r"^ARG RAY_VERSION=(\S+)", DOCKERFILE, re.M)[1]
    wanted = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert version in wanted["ray"] and version == CLUSTER["rayVersion"]
    python = re.search(r"^FROM rayproject/ray:\S*-py(\d)(\d+)-", DOCKERFILE, re.M)
    assert f"{python[1]}.{python[2]}" in Requirement(f"python{PROJECT['requires-python']}").specifier
    copied = {name for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.M) for name in line.split()[1:-1]}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied == {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *wheel["packages"]}
    assert all((ROOT / name).exists() for name in copied)
    tags = {container["image"] for container in containers()} | set(re.findall(r"-t (\S+)", DOCKERFILE))
    assert {tag.rpartition(":")[2] for tag in tags} == {PROJECT["version"]} and len(tags) == 1


def shell(line: str, extras: str) -> list[str]:
    """The words that a command of the build hands to sudo, or to pip."""
    env = {"EXTRAS": extras, "RAY_VERSION": "2.60.0"}
    stand_in = 'show() { printf "%s\\n" "$@"; }; sudo() { show "$@"; }; pip() { show "$@"; }; '
    return subprocess.check_output(["sh", "-c", stand_in + line], env=env, text=True).split()


def test_the_image_has_the_extras_that_are_asked_for():
    """None by default; with vLLM a compiler; each that docs and Dockerfile name is the package's."""
    install, compiler = re.findall(r"^RUN (.*)", DOCKERFILE, re.M)
    assert re.search(r"^ARG EXTRAS=$", DOCKERFILE, re.M) and DOCKERFILE.index("ARG EXTRAS") > DOCKERFILE.index("FROM ")
    for extras in ("", "[s3]", "[vllm]", "[s3,vllm]"):
        assert shell(install, extras) == ["install", "--no-cache-dir", f".{extras}", "ray[default]==2.60.0"]
        assert ("gcc" in shell(compiler, extras)) == ("vllm" in extras) == bool(shell(compiler, extras))
    text = DOCKERFILE.split("FROM")[0] + (ROOT / "docs" / "cluster.md").read_text()
    named = {name for names in re.findall(r"(?:EXTRAS='?|`)\[([\w,]+)\]", text) for name in names.split(",")}
    assert {"vllm", "s3"} == named <= PROJECT["optional-dependencies"].keys()
