"""Parts of aisp_dist on machines: plain classes here, made Ray actors in one place (cluster.py)."""
