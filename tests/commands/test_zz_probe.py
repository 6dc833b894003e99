import time, json, torch
from pathlib import Path
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
def test_a(config_file, values):
    print("threads", torch.get_num_threads())
    for i, n in enumerate((2,1,2)):
        torch.set_num_threads(n)
        t=time.time(); fit(read_plan(config_file(output_dir=values["output_dir"]+str(i), max_train_steps=6, gradient_checkpointing=False)), Screen(quiet=True)); print(n, time.time()-t)
        print([json.loads(l)["step_seconds"] for l in (Path(values["output_dir"]+str(i))/"metrics.jsonl").read_text().splitlines()])
