"""Keeps generated requests short, without making a wrong one right or a right one wrong."""
import schemathesis


def between(value, least, most):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    responses = case.operation.path.endswith("/responses")
    if not isinstance(body, dict) or not ("messages" in body or "prompt" in body or responses):
        return
    limits = ("max_output_tokens",) if responses else ("max_tokens", "max_completion_tokens")
    if case.meta.generation.mode.is_positive and not any(body.get(name) for name in limits):
        # Without one the answer fills the context.
        body[limits[0]] = 4
    for name in (*limits, "min_tokens"):
        if isinstance(body.get(name), int) and between(body[name], 9, 1 << 32):
            body[name] = body[name] % 8 + 1
    # A deadline that passes is a 504, as asked for.
    if between(body.get("timeout"), 0.001, 60):
        body["timeout"] = 60
