import sys; sys.path.insert(0,"/work/main")
import nbformat
from tests.test_notebook_form import RULES, code_cells, lines_of
from tests.test_exercises import form_faults
from statistics import median
nb=nbformat.read(sys.argv[1],4)
for n,r in RULES.items():
    if n in ("stored_clean",): continue
    for f in r(nb): print(n,":",f)
print("median",median(lines_of(c) for c in code_cells(nb)), sorted((lines_of(c) for c in code_cells(nb)))[-8:])
print(form_faults(nb,"07"))
