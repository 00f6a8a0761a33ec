// The page: language first, then the parts that are always there, then the view that the address names.

import { chatView } from "./chat/view.js";
import { deviceView } from "./device/view.js";
import { byId } from "./dom.js";
import { evaluateView } from "./evaluate/view.js";
import { loadLanguage } from "./i18n.js";
import { setUpRouter } from "./router.js";
import { setUpSettings } from "./settings.js";
import { setUpStatus } from "./status.js";

await loadLanguage();
setUpSettings();
const refreshStatus = setUpStatus();
byId("skip").addEventListener("click", () => byId("main").focus());
setUpRouter({ chat: await chatView(refreshStatus), device: deviceView(), evaluate: evaluateView() });
