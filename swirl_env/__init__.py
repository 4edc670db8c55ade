"""swirl-env: multi-step question answering and math as Gymnasium environments for language models.

Importing registers the ids:

    import gymnasium as gym, swirl_env
    env = gym.make("swirl/HotPotQA-v0")
"""

from swirl_env.registration import register_all

__version__ = "0.1.0"

register_all()
