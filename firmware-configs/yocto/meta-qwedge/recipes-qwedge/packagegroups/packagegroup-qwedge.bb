SUMMARY = "qwedge with the settings of its board"
DESCRIPTION = "What the image feature `qwedge` adds: the server, the board's settings, a model where there is one, a broker where a layer has it."
SECTION = "net"

PACKAGE_ARCH = "${MACHINE_ARCH}"

inherit packagegroup

RDEPENDS:${PN} = "\
    qwedge \
    qwedge-board \
    ${@'qwedge-model' if d.getVar('QWEDGE_BUNDLE') else ''} \
    ${@bb.utils.contains('BBFILE_COLLECTIONS', 'networking-layer', 'mosquitto', '', d)} \
"
