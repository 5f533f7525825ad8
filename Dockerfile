# The page of `showtell app` with the released model, on the CPU. It runs in ONNX Runtime, so that the image has no torch:
#     docker build -t showtell . && docker run --rm -p 7860:7860 showtell
FROM python:3.12-slim AS export
WORKDIR /export
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.14" "torchvision>=0.29" \
    && pip install --no-cache-dir "onnx>=1.17" "onnxruntime>=1.20" "safetensors>=0.4.5" "platformdirs>=4" "tqdm>=4.66"
COPY LICENSE README.md pyproject.toml requirements.txt setup.py vocab.pkl ./
COPY models/showtell-attend-1.safetensors models/
COPY showtell showtell
RUN python -m showtell export --model models/showtell-attend-1.safetensors --format onnx --out showtell-attend-1 \
    && pip wheel --no-cache-dir --no-deps --wheel-dir wheels .

FROM python:3.12-slim
WORKDIR /app
RUN pip install --no-cache-dir "gradio>=6.0" "numpy>=1.26" "onnxruntime>=1.20" "pillow>=10.3" "platformdirs>=4"
COPY --from=export /export/wheels wheels
COPY --from=export /export/showtell-attend-1 showtell-attend-1
RUN pip install --no-cache-dir --no-deps wheels/*.whl
USER 1000:1000
ENV HOME=/tmp
EXPOSE 7860
HEALTHCHECK --start-period=30s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/config', timeout=5)"]
CMD ["showtell", "app", "--model", "showtell-attend-1", "--host", "0.0.0.0"]
