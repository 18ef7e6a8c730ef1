"""Join the pieces and store the study; needs search.py in helpers/studies and "search" in STUDIES."""
import glob, pandas as pd
from helpers.studies import store_study
t = pd.concat([pd.read_pickle(f) for f in ["/tmp/n7/search0.pkl", "/tmp/n7/search1.pkl", *sorted(glob.glob("/tmp/n7/p-*.pkl"))]])
t["order"] = t.rate.map({"falling": 0, "constant": 1})
t = t.sort_values(["order", "seed", "trial", "samples"]).drop(columns="order")
assert len(t) == 2 * 5 * 32 * 4, len(t)
print(store_study("search", t))
