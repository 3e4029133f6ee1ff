/** Puts the page together: its parts, what each of them tells the others, and what is read from the server when. */

import { adaptation } from "./adapt.js";
import { adaptersTable } from "./adapters.js";
import { ApiError, getJson, request, whenLocked } from "./api.js";
import { comparison } from "./compare.js";
import { byId, setText } from "./dom.js";
import { importDialog } from "./importing.js";
import { lock } from "./lock.js";
import { worded } from "./notices.js";
import { Polling } from "./polling.js";
import { routeLog, routeTester } from "./routes.js";
import { counters, statusPanel } from "./status.js";

const LOG_LIMIT = 50;

const polling = new Polling(read);
const changed = () => polling.now();
const compare = comparison({ answered: changed });
const table = adaptersTable({ changed, compare: compare.choose });
const [status, metrics, log] = [statusPanel(), counters(), routeLog()];
importDialog({ changed });
adaptation({ changed, compare: compare.choose });
routeTester();

const pause = byId("pause");
pause.addEventListener("click", () => setPaused(pause.getAttribute("aria-pressed") !== "true"));

const gate = lock({ unlocked: () => setPaused(false) });
whenLocked((words, refused) => {
  polling.stop();
  gate.show(words, refused);
});

function setPaused(paused) {
  pause.setAttribute("aria-pressed", String(paused));
  if (paused) polling.stop();
  else polling.resume();
}

/** One round; the store and the log only when it is a whole one. Resolves to whether the server answered. */
async function read(whole) {
  try {
    await Promise.all([readServer(), whole && readStore()]);
    gate.hide();
    connected("connected", true);
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) console.error(error); // of our own making
    connected(error.status === 401 ? "locked" : worded(error), false);
    return false;
  }
}

async function readServer() {
  const [state, text] = await Promise.all([getJson("dnd/status"), request("metrics", { accept: "text/plain" })]);
  status.show(state);
  metrics.show(await text.text());
}

async function readStore() {
  const [adapters, decisions] = await Promise.all([getJson("dnd/adapters"), getJson(`dnd/log?limit=${LOG_LIMIT}`)]);
  table.show(adapters.data);
  compare.offer(adapters.data.map((adapter) => adapter.name));
  log.show(decisions.data);
}

function connected(words, is) {
  setText(byId("connection"), words);
  byId("connection").classList.toggle("lost", !is);
}

polling.now();
