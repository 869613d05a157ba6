"""Look the pinned packages up among known vulnerabilities, where that can be done."""

import json
import subprocess
import sys

_COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps"),
    *("--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"),
)
_MOST_SECONDS = 120


def main() -> int:
    """Exit code 1 where a package has a known vulnerability."""
    try:
        done = subprocess.run(
            _COMMAND, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False
        )
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        print(f"pip-audit: skipped, its data source did not answer ({type(error).__name__}).")
        return 0
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        print("pip-audit: skipped, its data source knows none of the packages here.")
        return 0
    vulnerable = [package for package in audited if package["vulns"]]
    for package in vulnerable:
        for fault in package["vulns"]:
            cure = ", ".join(fault["fix_versions"]) or "no fixed version yet"
            print(f"{package['name']} {package['version']}: {fault['id']} (fixed in: {cure})")
    print(f"pip-audit: {len(vulnerable)} of {len(audited)} packages are vulnerable.")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
