"""What stands in ``/sys`` on real boards, as far as it tells of heat and power.

Names and layout are those of the drivers' documentation and device trees; values are of public dumps where they are
named, else made up:

* Raspberry Pi: https://docs.kernel.org/hwmon/raspberrypi-hwmon.html, and the flags of
  https://www.raspberrypi.com/documentation/computers/os.html#get_throttled (0x50005 is its example)
* Jetson Orin Nano and AGX Orin: Linux, arch/arm64/boot/dts/nvidia/tegra234-p3767.dtsi and tegra234-p3701-0000.dtsi
  (labels of the rails, thermal zones), https://docs.kernel.org/hwmon/ina3221.html, and the driver ``soctherm_oc`` of
  NVIDIA's kernel; milliwatts of AGX Orin from a log of ``tegrastats`` that somebody published
* AGX Xavier: NVIDIA's Jetson Linux Developer Guide, "Power Monitor Information"
* RK3588: Linux, arch/arm64/boot/dts/rockchip/rk3588-base.dtsi (thermal zones)
* N100: https://docs.kernel.org/power/powercap/powercap.html, https://docs.kernel.org/hwmon/coretemp.html, and
  Documentation/ABI/testing/sysfs-devices-system-cpu (``thermal_throttle``)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RASPBERRY_PI_4 = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "82295",
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": "82295",
    "class/hwmon/hwmon1/name": "rpi_volt",
    "class/hwmon/hwmon1/in0_lcrit_alarm": "1",
    "class/thermal/cooling_device0/type": "gpio-fan",
    "class/thermal/cooling_device0/cur_state": "1",
    "devices/platform/soc/soc:firmware/get_throttled": "50005",
    "devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1800000",
    "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1800000",
}
RASPBERRY_PI_5 = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "57050",
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": "57050",
    "class/hwmon/hwmon1/name": "rp1_adc",
    "class/hwmon/hwmon1/temp1_input": "52611",
    "class/hwmon/hwmon2/name": "pwmfan",
    "class/hwmon/hwmon3/name": "rpi_volt",
    "class/hwmon/hwmon3/in0_lcrit_alarm": "0",
    "class/thermal/cooling_device0/type": "pwm-fan",
    "class/thermal/cooling_device0/cur_state": "1",
    "devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0",
}
JETSON_ORIN_NANO = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "51031",
    "class/thermal/thermal_zone8/type": "tj-thermal",
    "class/thermal/thermal_zone8/temp": "52343",
    "class/hwmon/hwmon1/name": "ina3221",
    "class/hwmon/hwmon1/in1_label": "VDD_IN",
    "class/hwmon/hwmon1/in1_input": "4984",
    "class/hwmon/hwmon1/curr1_input": "1856",
    "class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon1/in2_input": "4976",
    "class/hwmon/hwmon1/curr2_input": "480",
    "class/hwmon/hwmon1/in3_label": "VDD_SOC",
    "class/hwmon/hwmon1/in3_input": "4976",
    "class/hwmon/hwmon1/curr3_input": "296",
    "class/hwmon/hwmon1/in4_input": "9280",
    "class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "class/hwmon/hwmon1/in7_input": "13160",
    "class/hwmon/hwmon3/name": "soctherm_oc",
    "class/hwmon/hwmon3/oc1_event_cnt": "0",
    "class/hwmon/hwmon3/oc2_event_cnt": "15",
    "class/hwmon/hwmon3/oc3_event_cnt": "37",
    "class/thermal/cooling_device0/type": "cpufreq-cpu0",
    "class/thermal/cooling_device0/cur_state": "0",
    "class/thermal/cooling_device3/type": "pwm-fan",
    "class/thermal/cooling_device3/cur_state": "2",
    "class/thermal/cooling_device4/type": "gpu-throttle-alert",
    "class/thermal/cooling_device4/cur_state": "1",
    "class/thermal/cooling_device5/type": "cpu-throttle-alert",
    "class/thermal/cooling_device5/cur_state": "0",
    "devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1344000",
    "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1510400",
}
JETSON_AGX_ORIN = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "77281",
    "class/hwmon/hwmon3/name": "ina3221",
    "class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC",
    "class/hwmon/hwmon3/in1_input": "20000",
    "class/hwmon/hwmon3/curr1_input": "157",
    "class/hwmon/hwmon3/in2_label": "VDD_CPU_CV",
    "class/hwmon/hwmon3/in2_input": "20000",
    "class/hwmon/hwmon3/curr2_input": "715",
    "class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0",
    "class/hwmon/hwmon3/in3_input": "4968",
    "class/hwmon/hwmon3/curr3_input": "1000",
    "class/hwmon/hwmon4/name": "ina3221",
    "class/hwmon/hwmon4/in1_label": "NC",
    "class/hwmon/hwmon4/in1_input": "0",
    "class/hwmon/hwmon4/curr1_input": "0",
    "class/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO",
    "class/hwmon/hwmon4/in2_input": "4960",
    "class/hwmon/hwmon4/curr2_input": "220",
}
JETSON_AGX_XAVIER = {
    f"class/hwmon/hwmon{chip}/{file}{number}_{kind}": value
    for chip, labels in ((1, ("GPU", "CPU", "SOC")), (2, ("CV", "VDDRQ", "SYS5V")))
    for number, label in enumerate(labels, start=1)
    for file, kind, value in (("in", "label", label), ("in", "input", "19000"), ("curr", "input", "100"))
}
RK3588 = {
    "class/thermal/thermal_zone0/type": "package-thermal",
    "class/thermal/thermal_zone0/temp": "84076",
    "class/thermal/thermal_zone1/type": "bigcore0-thermal",
    "class/thermal/thermal_zone1/temp": "86153",
    "class/hwmon/hwmon0/name": "package_thermal",
    "class/hwmon/hwmon0/temp1_input": "84076",
    "class/thermal/cooling_device0/type": "pwm-fan",
    "class/thermal/cooling_device0/cur_state": "4",
    "class/thermal/cooling_device2/type": "thermal-cpufreq-1",
    "class/thermal/cooling_device2/cur_state": "3",
}
X86_N100 = {
    "class/thermal/thermal_zone0/type": "acpitz",
    "class/thermal/thermal_zone0/temp": "27800",
    "class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "class/thermal/thermal_zone1/temp": "63000",
    "class/hwmon/hwmon1/name": "nct6798",
    "class/hwmon/hwmon1/temp9_input": "127000",
    "class/hwmon/hwmon2/name": "drivetemp",
    "class/hwmon/hwmon2/temp1_input": "99000",
    "class/hwmon/hwmon3/name": "coretemp",
    "class/hwmon/hwmon3/temp1_input": "64000",
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "7000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0:0/energy_uj": "5000000",
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:1/name": "dram",
    "class/powercap/intel-rapl:0:1/energy_uj": "1000000",
    "class/powercap/intel-rapl:0:1/max_energy_range_uj": "65712999613",
    "class/powercap/intel-rapl:1/name": "psys",
    "class/powercap/intel-rapl:1/energy_uj": "0",
    "class/powercap/intel-rapl:1/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl-mmio:0/name": "package-0",
    "class/powercap/intel-rapl-mmio:0/energy_uj": "7000000",
    "class/powercap/intel-rapl-mmio:0/max_energy_range_uj": "262143328850",
    "class/thermal/cooling_device0/type": "Processor",
    "class/thermal/cooling_device0/cur_state": "0",
    "class/thermal/cooling_device4/type": "intel_powerclamp",
    "class/thermal/cooling_device4/cur_state": "-1",
    "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "0",
    "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "42",
    "devices/system/cpu/cpufreq/policy0/scaling_max_freq": "3400000",
    "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "3400000",
}


def plant(root: Path, tree: Mapping[str, str]) -> Path:
    """Write a tree; gives its root."""
    for name, text in tree.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n", encoding="ascii")
    return root
