"""The baseline: a server in the manner of the tutorial, which answers one request after the other.

    python -m benchmarks.tutorial_server --model PATH --port 6007

It writes the prompt as text and calls `model.generate` inside an `async def`, as many such servers do.
Only its stop tokens and its limit of new tokens are right, and it counts tokens, so that it can be
compared.
"""

import argparse
from datetime import datetime
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Question(BaseModel):
    """The body of POST /."""

    prompt: str
    history: list[dict[str, str]] = []
    max_tokens: int = 512


def prompt_text(question: Question) -> str:
    """The dialog in Llama-3's chat format, as text."""
    turns = [*question.history, {"role": "user", "content": question.prompt}]
    text = "<|begin_of_text|>"
    for turn in turns:
        text += f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content'].strip()}<|eot_id|>"
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def build_app(model_path: str) -> FastAPI:
    """Loads the model and returns the app that serves it."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    stop_ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    app = FastAPI()

    @app.post("/")
    async def answer(question: Question) -> dict[str, Any]:
        inputs = tokenizer(prompt_text(question), add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=question.max_tokens,
            do_sample=True,
            temperature=0.5,
            top_p=0.9,
            repetition_penalty=1.1,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        prompt_tokens = inputs.input_ids.shape[1]
        new_tokens = output[0, prompt_tokens:]
        return {
            "response": tokenizer.decode(new_tokens, skip_special_tokens=True),
            "status": 200,
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(new_tokens)},
        }

    return app


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="A blocking server in the tutorial's manner, on the CPU.")
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--port", type=int, default=6007)
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    uvicorn.run(build_app(args.model), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
