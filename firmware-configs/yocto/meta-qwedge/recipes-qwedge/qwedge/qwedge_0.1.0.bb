SUMMARY = "Language models over HTTP and MQTT on edge devices"
DESCRIPTION = "The server and command line of qwedge with the wheels of its lock, in a folder of their own, and its sandboxed service."
SECTION = "net"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

inherit features_check python3native python3-dir systemd useradd

DEPENDS += "python3-native"

require qwedge-wheels.inc

# The folder `wheels` of an offline kit for the same processor and Python: in local.conf.
QWEDGE_WHEELS_DIR ?= "${TOPDIR}/qwedge-kit/wheels"
QWEDGE_PYTHON = "${@d.getVar('PYTHON_BASEVERSION').replace('.', '')}"
QWEDGE_LOCKED = "${QWEDGE_WHEELS} ${QWEDGE_WHEELS_${QWEDGE_PYTHON}_${TARGET_ARCH}}"

FILESEXTRAPATHS:prepend := "${QWEDGE_FIRMWARE}/common:"
FILESEXTRAPATHS:prepend := "${QWEDGE_WHEELS_DIR}:"

SRC_URI = "\
    file://bin/qwedge \
    file://qwedge-${PV}-py3-none-any.whl \
    file://systemd/qwedge.service \
    file://systemd/qwedge.service.d/systemd-254.conf \
    file://tmpfiles.d/qwedge.conf \
    ${@' '.join(f'file://{name}' for name in d.getVar('QWEDGE_LOCKED').split())} \
"

S = "${UNPACKDIR}"

# Without wheels it is for no machine, so that the layer alone does no harm.
COMPATIBLE_HOST = "${@'(aarch64|x86_64).*-linux' if os.path.isdir(d.getVar('QWEDGE_WHEELS_DIR')) else 'null'}"
COMPATIBLE_HOST:libc-musl = "null"
REQUIRED_DISTRO_FEATURES = "systemd"

SYSTEMD_SERVICE:${PN} = "qwedge.service"

USERADD_PACKAGES = "${PN}"
USERADD_PARAM:${PN} = "--system --user-group --no-create-home --home-dir ${localstatedir}/lib/qwedge --shell ${base_sbindir}/nologin qwedge"

# What is compiled was compiled by the packages' makers.
INHIBIT_PACKAGE_STRIP = "1"
INHIBIT_PACKAGE_DEBUG_SPLIT = "1"
INHIBIT_SYSROOT_STRIP = "1"

do_verify[doc] = "Compares the wheels with the lock"
# Files that are here already have no checksums for bitbake.
python do_verify() {
    import os

    for name in d.getVar("QWEDGE_LOCKED").split():
        found = bb.utils.sha256_file(os.path.join(d.getVar("UNPACKDIR"), name))
        if found != d.getVarFlag("SRC_URI", f"{name}.sha256sum"):
            bb.fatal(f"{name} is not the one of the lock: its SHA-256 is {found}")
}
addtask verify after do_unpack before do_configure

do_install() {
    program=${D}/opt/qwedge/current
    site=$program/lib/python${PYTHON_BASEVERSION}/site-packages
    install -d $site $program/bin
    for wheel in qwedge-${PV}-py3-none-any.whl ${QWEDGE_LOCKED}; do
        ${PYTHON} -m zipfile -e ${UNPACKDIR}/$wheel $site
    done
    ${PYTHON} -m compileall -q --invalidation-mode unchecked-hash -s ${D} $site

    # An environment as `python -m venv` makes it.
    ln -s ${bindir}/python3 $program/bin/python
    printf 'home = ${bindir}\ninclude-system-site-packages = false\nversion = ${PYTHON_BASEVERSION}\n' >$program/pyvenv.cfg
    printf '#!/opt/qwedge/current/bin/python\nimport sys\nfrom edge.cli import main\nsys.exit(main())\n' >$program/bin/qwedge
    chmod 0755 $program/bin/qwedge

    install -D -m 0755 ${UNPACKDIR}/bin/qwedge ${D}${bindir}/qwedge
    install -D -m 0644 ${UNPACKDIR}/systemd/qwedge.service ${D}${systemd_system_unitdir}/qwedge.service
    install -D -m 0644 ${UNPACKDIR}/systemd/qwedge.service.d/systemd-254.conf \
        ${D}${systemd_system_unitdir}/qwedge.service.d/systemd-254.conf
    install -D -m 0644 ${UNPACKDIR}/tmpfiles.d/qwedge.conf ${D}${nonarch_libdir}/tmpfiles.d/qwedge.conf
}

FILES:${PN} += "/opt/qwedge ${nonarch_libdir}/tmpfiles.d ${systemd_system_unitdir}"

RDEPENDS:${PN} += "python3-modules qwedge-board"

# Wheels are stripped, and linked without the distribution's flags.
INSANE_SKIP:${PN} += "already-stripped ldflags"
