"""`ToolVectorEnv`: N episodes in one object; a step runs all of their tools at once, then asks each judge once.

It is Gymnasium's `SyncVectorEnv` (autoreset modes, seeds, `call`, `get_attr`, ...) with one step before each step: actions are
read, tools called and judges asked for all N together, and every environment finds its part done when its turn comes.
Tools that take over a millisecond run in threads; the order of calls within an episode is kept.

It takes wrapped environments. Below a wrapper that may change the action (an `ActionWrapper`, or a wrapper of yours that
overrides `step`) nothing can be done ahead: such an environment takes its whole step in turn.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from swirl_env.env import Taken, ToolEnv
from swirl_env.errors import ConfigError
from swirl_env.judges import ask
from swirl_env.tools import call_tool
from swirl_env.types import Action, Judge, StepView, ToolResult, Verdict

SLOW_SECONDS = 0.001
"""Tools that took longer than this run in threads."""
MAX_THREADS = 64


class ToolVectorEnv(SyncVectorEnv):
    """N environments over `ToolEnv`, wrapped or not.

    Args:
        env_fns: each makes one environment.
        autoreset_mode: `NextStep` (default), `SameStep` or `Disabled`, as in Gymnasium.

    Raises:
        ConfigError: an environment is not over `ToolEnv`.

    Observations are a tuple of N strings; `reset(options={"task_id": [...]})` takes N task ids (or one for all).
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gym.Env]], autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP
    ):
        try:
            mode = AutoresetMode(autoreset_mode)
        except ValueError:
            known = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise ConfigError(f"autoreset_mode is one of {known}; got {autoreset_mode!r}.") from None
        if not all(callable(make) for make in env_fns):
            raise ConfigError("ToolVectorEnv takes functions that make environments, such as [make_env] * 8.")
        if not env_fns:
            raise ConfigError("A vector environment needs at least one environment.")
        super().__init__(env_fns, copy=False, autoreset_mode=mode)  # texts cannot be changed
        if len({id(env.unwrapped) for env in self.envs}) < len(self.envs):
            raise ConfigError("Two of the environments are one and the same: each function must make a new one.")
        self._bases: list[ToolEnv] = []
        judges: dict[str, Judge] = {}
        for env in self.envs:
            base = env.unwrapped
            if not isinstance(base, ToolEnv):
                raise ConfigError(f"ToolVectorEnv takes environments over ToolEnv, got {type(base).__name__}.")
            if base.judge is not None and base.judge_name is not None:
                base.judge = judges.setdefault(base.judge_name, base.judge)  # one object, so one call
            self._bases.append(base)
        self._ahead = [_passes_actions_on(env) for env in self.envs]
        self._slow: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        task_ids = (options or {}).get("task_id")
        if not isinstance(task_ids, (list, tuple, np.ndarray)):
            return super().reset(seed=seed, options=options)  # type: ignore[arg-type]
        if len(task_ids) != self.num_envs:
            raise ConfigError(f"options['task_id'] holds {len(task_ids)} ids for {self.num_envs} environments.")
        assert options is not None
        for base, task_id in zip(self._bases, task_ids, strict=True):
            base.next_task = None if task_id is None else str(task_id)
        try:
            rest = {key: value for key, value in options.items() if key != "task_id"}
            return super().reset(seed=seed, options=rest or None)  # type: ignore[arg-type]
        finally:
            for base in self._bases:
                base.next_task = None

    def step(self, actions: Sequence[str]) -> tuple[Any, ...]:
        if len(actions) != self.num_envs:
            raise ConfigError(f"step() takes {self.num_envs} actions, one an environment; got {len(actions)}.")
        actions = tuple(actions)
        self._prepare(actions)
        return super().step(actions)

    def skip(self, places: Sequence[int]) -> None:
        """In the next step these begin a new episode, whatever their action (in `NextStep` mode): no tool is called for them and no
        judge asked. For those whose episodes are over while others still run."""
        self._autoreset_envs[list(places)] = True

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        """As Gymnasium's, without making a new mask for each value."""
        for key, value in env_info.items():
            if key == "outcome" and value is None:
                value = float("nan")  # unknown, in an array of numbers
            if key in vector_infos and not isinstance(value, dict):
                vector_infos[key][env_num] = value
                vector_infos[f"_{key}"][env_num] = True
            else:
                super()._add_info(vector_infos, {key: value}, env_num)
        return vector_infos

    def _prepare(self, actions: tuple[str, ...]) -> None:
        skipped = self._autoreset_envs if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.zeros(self.num_envs)
        live = [i for i, ahead in enumerate(self._ahead) if ahead and not skipped[i] and self._bases[i].running]
        parsed = {i: self._bases[i].grammar.parse(actions[i]) for i in live}
        results = self._call_tools(parsed)
        verdicts: dict[int, Verdict] = {}
        batches: dict[int, tuple[Judge, list[int], list[StepView]]] = {}
        for i in live:
            base = self._bases[i]
            if base.judge is not None:
                _, members, views = batches.setdefault(id(base.judge), (base.judge, [], []))
                members.append(i)
                views.append(base.view(parsed[i], results[i]))
        for judge, members, views in batches.values():
            verdicts.update(zip(members, ask(judge, views), strict=True))
        for i in live:
            self._bases[i].prepare(Taken(actions[i], parsed[i], results[i], verdicts.get(i)))

    def _call_tools(self, parsed: dict[int, Action]) -> dict[int, tuple[ToolResult, ...]]:
        """The results of each action's calls, in order; actions that call slow tools run beside each other."""
        results: dict[int, tuple[ToolResult, ...]] = {}
        slow: list[int] = []
        for i, action in parsed.items():
            if not action.calls:
                results[i] = ()
            elif any(call.name in self._slow for call in action.calls):
                slow.append(i)
            else:
                results[i] = self._call(i, action)
        if slow:
            self._pool = self._pool or ThreadPoolExecutor(min(self.num_envs, MAX_THREADS), "swirl-tools")
            results.update(zip(slow, self._pool.map(lambda i: self._call(i, parsed[i]), slow), strict=True))
        return results

    def _call(self, i: int, action: Action) -> tuple[ToolResult, ...]:
        results = []
        for call in action.calls:
            results.append(call_tool(self._bases[i].tools, call))
            if results[-1].seconds > SLOW_SECONDS:
                self._slow.add(call.name)
        return tuple(results)

    def close_extras(self, **kwargs: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close_extras(**kwargs)


def _passes_actions_on(env: gym.Env) -> bool:
    """Whether every wrapper hands the action to the next as it is."""
    while isinstance(env, gym.Wrapper):
        known = type(env).step in (gym.Wrapper.step, gym.RewardWrapper.step, gym.ObservationWrapper.step)
        known = known or type(env).__module__.startswith(("gymnasium.wrappers.", "swirl_env.wrappers"))
        if not known or isinstance(env, gym.ActionWrapper):
            return False
        env = env.env
    return True
