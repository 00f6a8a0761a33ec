SUMMARY = "Settings of qwedge for one board"
DESCRIPTION = "Threads, caches and limits of qwedge as firmware-configs has them for the board that QWEDGE_BOARD names."
SECTION = "net"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

# A folder of firmware-configs: in local.conf or the machine's configuration.
QWEDGE_BOARD ?= "generic-arm64"
QWEDGE_BOARD:x86-64 ?= "x86-n100"

FILESEXTRAPATHS:prepend := "${QWEDGE_FIRMWARE}/common:"
FILESEXTRAPATHS:prepend := "${QWEDGE_FIRMWARE}/${QWEDGE_BOARD}:"

SRC_URI = "\
    file://board.conf \
    file://edge.toml \
    file://journald.conf.d/qwedge.conf \
    file://sysctl.d/80-qwedge.conf \
"

S = "${UNPACKDIR}"

PACKAGE_ARCH = "${MACHINE_ARCH}"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -D -m 0644 ${UNPACKDIR}/edge.toml ${D}${sysconfdir}/qwedge/edge.toml
    install -D -m 0644 ${UNPACKDIR}/board.conf ${D}${systemd_system_unitdir}/qwedge.service.d/board.conf
    install -D -m 0644 ${UNPACKDIR}/journald.conf.d/qwedge.conf ${D}${nonarch_libdir}/systemd/journald.conf.d/qwedge.conf
    install -D -m 0644 ${UNPACKDIR}/sysctl.d/80-qwedge.conf ${D}${nonarch_libdir}/sysctl.d/80-qwedge.conf
}

FILES:${PN} += "${systemd_system_unitdir} ${nonarch_libdir}/systemd ${nonarch_libdir}/sysctl.d"
CONFFILES:${PN} = "${sysconfdir}/qwedge/edge.toml"
