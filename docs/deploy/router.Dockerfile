# An image of the router: docker build -f docs/deploy/router.Dockerfile -t vllm-router .
FROM python:3.12-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/router
COPY constraints.txt ./
RUN python -m venv venv && venv/bin/pip install -c constraints.txt vllm-router
RUN useradd --uid 10001 --no-create-home router
ENV PATH=/opt/router/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["vllm-router", "--host", "0.0.0.0", "--port", "8000"]
