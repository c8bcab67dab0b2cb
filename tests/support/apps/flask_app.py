"""A Flask app: a page, and a form."""

from __future__ import annotations

import os

from flask import Flask, Response, jsonify, request

app = Flask(__name__)


@app.after_request
def says_who_answered(response: Response) -> Response:
    """What the load client needs."""
    response.headers["X-Served-By"] = str(os.getpid())
    return response


@app.get("/")
def who() -> Response:
    return jsonify(pid=os.getpid())


@app.post("/greet")
def greet() -> str:
    return f"Hello, {request.form['name']}"
