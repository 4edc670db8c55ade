"""`swirl view`: trajectories in the browser. `index` knows where each line lies, `pages` shows them, `server` is the loopback."""
