"""What KubeRay accepts, as far as deploy/ uses it: fields of its custom resources (ray.io/v1, KubeRay 1.5.1 to 1.7),
and the rules that its operator enforces beyond them. Unknown fields are errors; Kubernetes would drop them silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$")]
OLDEST_RAY_WITH_TOKENS = (2, 52)


class Manifest(BaseModel):
    """Strict: no unknown field, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class KeyRef(Manifest):
    name: Name
    key: str


class ValueFrom(Manifest):
    secretKeyRef: KeyRef


class EnvVar(Manifest):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        assert (self.value is None) != (self.valueFrom is None), f"{self.name}: one of value and valueFrom"
        return self


class Port(Manifest):
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$")]
    containerPort: int = Field(ge=1, le=65535)


class Resources(Manifest):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class HttpGet(Manifest):
    path: str
    port: int | str


class Exec(Manifest):
    command: list[str]


class Probe(Manifest):
    httpGet: HttpGet | None = None
    exec: Exec | None = None
    initialDelaySeconds: int = 0
    periodSeconds: int = 10
    timeoutSeconds: int = 1
    failureThreshold: int = 3


class Seccomp(Manifest):
    type: Literal["RuntimeDefault"]


class PodSecurity(Manifest):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(gt=0)
    runAsGroup: int | None = Field(default=None, gt=0)
    fsGroup: int | None = Field(default=None, gt=0)
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"] = "Always"
    seccompProfile: Seccomp


class Capabilities(Manifest):
    drop: list[str]


class ContainerSecurity(Manifest):
    allowPrivilegeEscalation: Literal[False]
    readOnlyRootFilesystem: bool = False
    capabilities: Capabilities


class Mount(Manifest):
    name: Name
    mountPath: str
    readOnly: bool = False


class Container(Manifest):
    name: Name
    image: str
    command: list[str] = []
    args: list[str] = []
    ports: list[Port] = []
    env: list[EnvVar] = []
    resources: Resources
    startupProbe: Probe | None = None
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    securityContext: ContainerSecurity
    volumeMounts: list[Mount] = []


class Claim(Manifest):
    claimName: Name
    readOnly: bool = False


class EmptyDir(Manifest):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity | None = None


class NamedObject(Manifest):
    name: Name


class Volume(Manifest):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None
    configMap: NamedObject | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        assert len(self.model_fields_set) == 2, f"volume {self.name} has to have one source"
        return self


class Toleration(Manifest):
    key: str
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class PodSpec(Manifest):
    automountServiceAccountToken: bool = True
    restartPolicy: Literal["Never", "Always", "OnFailure"] | None = None
    terminationGracePeriodSeconds: int = 30
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> Self:
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        assert mounted <= {volume.name for volume in self.volumes} | {"data"}, mounted
        return self


class PodMetadata(Manifest):
    labels: dict[str, str]


class PodTemplate(Manifest):
    metadata: PodMetadata | None = None
    spec: PodSpec


class HeadGroup(Manifest):
    rayStartParams: dict[str, str]
    labels: dict[str, str]
    template: PodTemplate


class WorkerGroup(Manifest):
    groupName: Name
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    rayStartParams: dict[str, str]
    labels: dict[str, str]
    template: PodTemplate

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        assert self.minReplicas <= self.replicas <= self.maxReplicas, self.groupName
        return self


class Auth(Manifest):
    mode: Literal["token"]


class Autoscaler(Manifest):
    version: Literal["v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    securityContext: ContainerSecurity
    resources: Resources


class GcsFaultTolerance(Manifest):
    redisAddress: str
    redisPassword: dict[Literal["valueFrom"], ValueFrom]


class RayClusterSpec(Manifest):
    rayVersion: str
    authOptions: Auth
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def _as_the_operator_checks(self) -> Self:
        names = [group.groupName for group in self.workerGroupSpecs]
        assert len(set(names)) == len(names), names
        version = tuple(int(part) for part in self.rayVersion.split("."))
        assert version >= OLDEST_RAY_WITH_TOKENS, "authOptions.mode token needs Ray 2.52"
        for group in (self.headGroupSpec, *self.workerGroupSpecs):
            assert "labels" not in group.rayStartParams, "labels have a field of their own"
            assert group.template.spec.restartPolicy in (None, "Never"), "autoscaler v2 makes pods anew by itself"
        taken = {"RAY_REDIS_ADDRESS", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
        taken |= {"REDIS_PASSWORD"} if self.gcsFaultToleranceOptions else set()
        env = {entry.name for entry in self.headGroupSpec.template.spec.containers[0].env}
        assert not env & taken, "KubeRay sets these on the head itself, and refuses a second source"
        return self


class RayJobSpec(Manifest):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    backoffLimit: int = Field(default=0, ge=0)
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = Field(default=0, ge=0)
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def _as_the_operator_checks(self) -> Self:
        assert self.shutdownAfterJobFinishes or not self.ttlSecondsAfterFinished
        assert self.submissionMode == "K8sJobMode", "only a submitter job has a submitterPodTemplate"
        assert self.submitterPodTemplate.spec.restartPolicy in ("Never", "OnFailure"), "a Job's pod"
        return self


class UpgradeStrategy(Manifest):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Manifest):
    upgradeStrategy: UpgradeStrategy
    excludeHeadPodFromServeSvc: bool = False
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec

    @model_validator(mode="after")
    def _as_the_operator_checks(self) -> Self:
        ports = self.rayClusterConfig.headGroupSpec.template.spec.containers[0].ports
        assert "serve" in {port.name for port in ports}, "KubeRay makes its serve service from this port"
        assert isinstance(yaml.safe_load(self.serveConfigV2), dict)
        for group in self.rayClusterConfig.workerGroupSpecs:
            probe = group.template.spec.containers[0].readinessProbe
            assert probe is not None, "KubeRay's own probe asks for a Serve proxy, and there is none"
        return self


SPECS: dict[str, type[Manifest]] = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec, "RayService": RayServiceSpec}


def cluster_of(document: dict[str, Any]) -> RayClusterSpec:
    """The Ray cluster in a RayCluster, RayJob or RayService, checked together with what is around it."""
    assert document["apiVersion"] == "ray.io/v1"
    spec = SPECS[document["kind"]].model_validate(document["spec"])
    if isinstance(spec, RayJobSpec):
        return spec.rayClusterSpec
    if isinstance(spec, RayServiceSpec):
        return spec.rayClusterConfig
    assert isinstance(spec, RayClusterSpec)
    return spec
