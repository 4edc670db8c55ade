"""A person acts in the terminal."""

from typing import Any

import gymnasium as gym


def play(env: gym.Env, *, seed: int | None = None, task_id: str | None = None) -> None:
    """Print the observation, read one action a line, and go on until the episode or the input ends.

    Args:
        env: over `ToolEnv`.
        seed: of the random task.
        task_id: of the task; `None`: a random one.

    Examples:
        >>> import io, sys, gymnasium as gym, swirl_env
        >>> from swirl_agents.human import play
        >>> sys.stdin, terminal = io.StringIO("<calculator>10+3</calculator>\\n<answer>38</answer>\\n"), sys.stdin
        >>> play(gym.make("swirl/GSM8K-v0"), seed=0)
        Solve the math problem. ...
        Right. The gold answer: 38
        >>> sys.stdin = terminal
    """
    options: dict[str, Any] = {} if task_id is None else {"task_id": task_id}
    text, info = env.reset(seed=seed, options=options)
    print(f"{text}\n\n(one action a line; Ctrl-D leaves)")
    done = False
    while not done:
        try:
            action = input("\n> ")
        except EOFError:
            print("\nThe input ended before the episode.")
            return
        _, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        step = info["step"]
        if step.observation:
            print(step.observation)
        print(f"[reward {reward:.2f}: {step.verdict.reason if step.verdict else 'no judge'}]")
    task = env.unwrapped.task  # type: ignore[attr-defined]
    print(f"\n{'Right' if info['outcome'] >= 0.5 else 'Not right'}. The gold answer: {task.answers[0]}")
