# The head and the learner of a run, with the versions of constraints.txt (torch for CUDA). From the repository's root:
#
#   docker build -f docker/learner.Dockerfile -t raylign-learner:0.1.0 .
#   docker run --rm --gpus all --shm-size 8g -v $PWD/runs:/runs raylign-learner:0.1.0 \
#     raylign train quickstart_image --run-dir /runs/first
#
# All nodes of a Ray cluster need the same Python, the same Ray and the same Raylign: build all images from one commit.
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY raylign raylign
COPY configs configs
COPY learner learner
COPY rollout rollout
COPY rewards rewards
COPY services services
RUN pip install --root=/image -c constraints.txt .

FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
# Ray starts many processes; an init as the first one reaps them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /var/lib/raylign --uid 10001 raylign
COPY --from=build /image/ /
COPY --chmod=0555 docker/train-or-resume /usr/local/bin/train-or-resume
# GPUs are given by the container runtime, their driver's libraries by this; `--gpus`, or the pod's limit, says which.
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /var/lib/raylign
# No HEALTHCHECK: what answers depends on the command. A node of a cluster answers at :52365/api/healthz.
ENTRYPOINT ["tini", "--"]
CMD ["raylign", "--help"]
