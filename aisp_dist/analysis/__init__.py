"""After a run: finished outputs are compared, tuned, evaluated, reported, exported and rescored."""
