# A judge: vLLM's own image, with a user that is not root. Its pins and Raylign's do not mix, and nothing of Raylign is in
# it: rewards ask it over HTTP (docs/judge_engine.md). From the repository's root:
#
#   docker build -f docker/judge.Dockerfile -t raylign-judge:0.1.0 .
#   docker run --gpus all --ipc host -p 8000:8000 -e VLLM_API_KEY raylign-judge:0.1.0 Qwen/Qwen2.5-VL-7B-Instruct
FROM vllm/vllm-openai:v0.33.0
# torch looks its user up by name, so a bare number would not do.
RUN useradd --create-home --home-dir /var/lib/judge --uid 10001 judge \
    && install --directory --owner=judge --group=judge /var/lib/judge/.cache /var/lib/judge/.cache/huggingface
ENV VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /var/lib/judge
EXPOSE 8000
# The first start downloads the model.
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
