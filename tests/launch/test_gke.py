"""The JobSets for GKE: what must agree in a file, with its config, and with launch/README.md."""

import math
import pathlib
import re

import pytest
import yaml

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.planning.text import LAUNCHED
from moejax.train import processes
from moejax.watchdog.deadlines import parse

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
FILES = ("gke_tpu.yaml", "gke_gpu.yaml")


def job_set(name):
    (document,) = yaml.safe_load_all((LAUNCH / name).read_text())
    return document


def parts(name):
    """(the only replicated job, its Job's spec, its pods' spec, its only container)"""
    (replicated,) = job_set(name)["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def environment(container):
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def experiment(container, monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)
    command, action, config = container["command"]
    assert (command, action) == ("moejax", "train")
    return build_config(load_config(config))


def test_tpu_hosts_and_chips_are_those_of_the_topology_and_the_mesh(monkeypatch):
    replicated, job, pod, container = parts("gke_tpu.yaml")
    selector = pod["nodeSelector"]
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert per_host == 4  # of every multi-host v5p slice
    assert job["completions"] == job["parallelism"] == chips // per_host
    devices = replicated["replicas"] * chips
    mesh = experiment(container, monkeypatch).mesh
    sizes = mesh.sizes(devices)
    assert math.prod(sizes.values()) == devices
    assert sizes["data"] % replicated["replicas"] == 0  # between slices go gradients alone
    text = "exclusive-topology"
    (placed,) = (
        v for k, v in job_set("gke_tpu.yaml")["metadata"]["annotations"].items() if text in k
    )
    assert placed == "cloud.google.com/gke-nodepool"


def test_gpu_processes_are_those_of_the_environment_and_the_mesh(monkeypatch):
    replicated, job, pod, container = parts("gke_gpu.yaml")
    told = environment(container)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    nodes = int(told["MOEJAX_NUM_PROCESSES"])
    assert replicated["replicas"] == 1
    assert job["completions"] == job["parallelism"] == nodes
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == "nvidia-h100-80gb"
    sizes = experiment(container, monkeypatch).mesh.sizes(nodes * gpus)
    assert math.prod(sizes.values()) == nodes * gpus
    assert sizes["expert"] <= gpus  # experts within a node, as the config says
    (index,) = (e for e in container["env"] if e["name"] == "MOEJAX_PROCESS_ID")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


def test_gpus_give_the_memory_that_plans_and_readme_name():
    stated = environment(parts("gke_gpu.yaml")[3])["XLA_CLIENT_MEM_FRACTION"]
    assert float(stated) == LAUNCHED
    assert f"XLA_CLIENT_MEM_FRACTION:-{stated}}}" in (LAUNCH / "slurm.sh").read_text()
    assert f"JAX takes {LAUNCHED:.0%} of a GPU" in (LAUNCH / "README.md").read_text()


def test_the_coordinator_is_the_first_pod_behind_the_headless_service():
    replicated, _, _, container = parts("gke_gpu.yaml")
    document = job_set("gke_gpu.yaml")
    network = document["spec"]["network"]
    host, _, port = environment(container)["MOEJAX_COORDINATOR"].partition(":")
    pod = f"{document['metadata']['name']}-{replicated['name']}-0-0"
    assert host == f"{pod}.{network['subdomain']}"
    assert int(port) in {entry["containerPort"] for entry in container["ports"]}
    given = {name: value or "3" for name, value in environment(container).items()}
    settings = processes._settings(given)
    assert settings["num_processes"] == 8
    assert settings["process_id"] == 3


@pytest.mark.parametrize("name", FILES)
def test_what_every_job_set_needs(name):
    document = job_set(name)
    replicated, job, pod, container = parts(name)
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    network = document["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0  # one pod alone cannot come back: all restart together
    assert pod["restartPolicy"] == "Never"  # or podFailurePolicy is refused
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert container["resources"]["limits"] == container["resources"]["requests"]
    grace = float(environment(container)["MOEJAX_GRACE"])
    assert grace == pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", FILES)
def test_a_stop_is_no_completion_and_a_users_mistake_no_restart(name):
    document = job_set(name)
    _, job, _, container = parts(name)
    stopped = int(environment(container)["MOEJAX_STOPPED_STATUS"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]  # of a UserError
    assert stopped not in (0, *rule["onExitCodes"]["values"])
    (reaction,) = document["spec"]["failurePolicy"]["rules"]
    assert reaction == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


@pytest.mark.parametrize("name", FILES)
def test_the_watchdog_is_on_and_there_is_time_to_save(name):
    _, _, pod, container = parts(name)
    assert parse(environment(container)["MOEJAX_WATCHDOG"])
    assert pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("name", FILES)
def test_the_run_is_in_the_bucket_that_is_mounted(name):
    _, job, pod, container = parts(name)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    overrides = dict(arg.split("=", 1) for arg in container["args"])
    for path in ("workdir", "data.train.path"):
        assert overrides[path].startswith("/bucket/")
    assert mounted["/bucket"]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert environment(container)["MOEJAX_CACHE"] in mounted
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


def test_every_placeholder_is_explained():
    text = (LAUNCH / "README.md").read_text()
    for name in FILES:
        found = set(re.findall(r"REPLACE-[A-Z-]+", (LAUNCH / name).read_text()))
        assert found == {"REPLACE-IMAGE", "REPLACE-BUCKET", "REPLACE-SERVICE-ACCOUNT"}
        assert {p for p in found if f"`{p}`" not in text} == set()
