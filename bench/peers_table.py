"""The table of make bench-peers, from its log: medians over the rounds, ratios to the fastest peer."""
import json
import platform
import statistics
import subprocess
import sys

rows = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
cases = sorted({(r["dtype"], r["seq"], r.get("method", "lora")) for r in rows}, key=lambda c: (c[1], c[0] != "float32", c[2]))
cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
versions = next((r["versions"] for r in rows if "versions" in r), "")
print(f"{cpu}, {rows[0]['threads']} threads, graft {commit}, {versions}; medians over the runs\n")
print("| case | who | runs | tokens/s | graft is faster by | peak RSS, GiB | start to first step, s |")
print("| --- | --- | --- | --- | --- | --- | --- |")
for dtype, seq, method in cases:
    here = [r for r in rows if (r["dtype"], r["seq"], r.get("method", "lora")) == (dtype, seq, method)]
    name = dtype if method == "lora" else f"{method}, {dtype}"
    median = lambda who, key: statistics.median(r[key] for r in here if r["who"] == who)  # noqa: E731
    for who in sorted({r["who"] for r in here}):
        ratio = "" if who == "graft" else f"{median('graft', 'tok_s') / median(who, 'tok_s'):.2f}"
        print(f"| {name}, {seq} tokens | {who} | {sum(r['who'] == who for r in here)} | {median(who, 'tok_s'):.1f} | {ratio} | {median(who, 'peak_rss_gib'):.2f} | {median(who, 'start_to_first_step_s'):.1f} |")
