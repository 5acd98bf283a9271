# The reward service on a CPU, with the versions of constraints.txt. From the repository's root:
#
#   docker build -f docker/rewards.Dockerfile -t raylign-rewards:0.1.0 .
#   docker run -p 8000:8000 --shm-size 1g -e RAYLIGN_REWARD_TOKEN -v $PWD/rewards.toml:/etc/raylign/rewards.toml:ro raylign-rewards:0.1.0
#
# rewards.toml says `host = "0.0.0.0"`; beyond loopback the service does not start without a token.
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
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
ENV PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /var/lib/raylign
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v1/healthz', timeout=8)"]
ENTRYPOINT ["tini", "--", "raylign", "serve-rewards"]
CMD ["/etc/raylign/rewards.toml"]
