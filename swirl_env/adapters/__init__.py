"""The environments in other people's trainers: TRL, verifiers, SkyRL, OpenEnv. One file each, an extra of the same name each; no trainer code."""
