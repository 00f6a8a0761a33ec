SUMMARY = "A model for qwedge"
DESCRIPTION = "An exported bundle in the image, which goes to the model store at the first start: verified, tried and switched to."
SECTION = "net"
# The model's own licence: the bundle's manifest.json names it.
LICENSE = "CLOSED"

inherit allarch features_check systemd

# The folder of a bundle (`qwedge export`): in local.conf. Without one there is no such package.
QWEDGE_BUNDLE ?= ""
QWEDGE_FILES = "${@' '.join(sorted(os.listdir(d.getVar('QWEDGE_BUNDLE')))) if d.getVar('QWEDGE_BUNDLE') else ''}"

FILESEXTRAPATHS:prepend := "${QWEDGE_BUNDLE}:"

SRC_URI = "\
    file://qwedge-model.service \
    ${@' '.join(f'file://{name}' for name in d.getVar('QWEDGE_FILES').split())} \
"

S = "${UNPACKDIR}"

REQUIRED_DISTRO_FEATURES = "systemd"

SYSTEMD_SERVICE:${PN} = "qwedge-model.service"

# Without a bundle it is for no machine.
COMPATIBLE_HOST = "${@'.*' if d.getVar('QWEDGE_BUNDLE') else 'null'}"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -d ${D}${datadir}/qwedge/model
    for name in ${QWEDGE_FILES}; do
        install -m 0644 ${UNPACKDIR}/$name ${D}${datadir}/qwedge/model/$name
    done
    install -D -m 0644 ${UNPACKDIR}/qwedge-model.service ${D}${systemd_system_unitdir}/qwedge-model.service
}

FILES:${PN} += "${datadir}/qwedge"

RDEPENDS:${PN} += "qwedge"
