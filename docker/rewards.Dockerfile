# The reward service on a CPU, with the versions of constraints.txt. From the repository's root:
#
#   docker build -f docker/rewards.Dockerfile -t raylign-rewards .
#   docker run -p 8000:8000 --shm-size 1g -e RAYLIGN_REWARD_TOKEN -v $PWD/rewards.toml:/etc/raylign/rewards.toml:ro raylign-rewards
#
# rewards.toml says `host = "0.0.0.0"`; beyond loopback the service does not start without a token.
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \
    HF_HUB_OFFLINE=1 \
    RAY_USAGE_STATS_ENABLED=0

# Ray starts many processes; an init as the first one reaps them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 raylign

WORKDIR /opt/raylign
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY raylign raylign
COPY configs configs
COPY learner learner
COPY rollout rollout
COPY rewards rewards
COPY services services
RUN pip install -c constraints.txt .

USER raylign
WORKDIR /home/raylign
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v1/healthz', timeout=8)"]
ENTRYPOINT ["tini", "--", "raylign", "serve-rewards"]
CMD ["/etc/raylign/rewards.toml"]
