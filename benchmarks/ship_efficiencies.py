"""Fit the costs that ship to the published rows that ship: `device_profiles/data/efficiencies.json`.

Run it after a change of the rows, of a device's bandwidth or kind, or of the fit.
"""

from edgewright.device_profiles.calibrate import calibrate
from edgewright.device_profiles.efficiencies import SHIPPED, to_json
from edgewright.device_profiles.published_rows import read_rows

if __name__ == "__main__":
    rows, left_out = read_rows()
    SHIPPED.write_text(to_json(calibrate(rows, version="qai-hub-models 0.65.0")))
    print(f"{SHIPPED}: {len(rows)} rows", *left_out, sep="\n")
