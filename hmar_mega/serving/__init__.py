"""A small HTTP service around one model: `hmar-mega serve MODEL`. Needs the extra `serve` (FastAPI and uvicorn)."""
