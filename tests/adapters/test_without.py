"""What the adapters need, and what they say where it is missing."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [("verifiers", "verifiers", "verifiers"), ("skyrl", "skyrl_gym", "skyrl"), ("openenv", "openenv", "openenv")],
)
def test_a_missing_package_is_named_with_its_extra(adapter, package, extra):
    done = run(f"import sys; sys.modules[{package!r}] = None; import swirl_env.adapters.{adapter}")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"pip install 'swirl-env[{extra}]'.")


def test_rewards_need_neither_trl_nor_torch():
    done = run(
        "import sys; sys.modules['torch'] = sys.modules['trl'] = sys.modules['datasets'] = None\n"
        "from swirl_env.adapters import trl\n"
        "env = trl.spec('swirl/GSM8K-v0').environment_factory()\n"
        "env.reset(task_id='gsm8k-train-170')\n"
        "print(env.calculator(expression='10+3'), trl.outcome([[{'role': 'assistant', 'content': '38'}]], [env]))"
    )
    assert done.stdout.split() == ["13", "[1.0]"], done.stderr
