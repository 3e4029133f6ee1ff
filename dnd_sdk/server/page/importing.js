/** The dialog that takes a PEFT adapter into the store: its config and its weights. */

import { getJson } from "./api.js";
import { byId, setText } from "./dom.js";
import { during, tell, worded } from "./notices.js";

/** `changed()` is called after an adapter has come in. */
export function importDialog({ changed }) {
  const [dialog, form, error, send] = ["import", "import-form", "import-error", "import-send"].map(byId);
  byId("import-open").addEventListener("click", () => {
    form.reset();
    setText(error, "");
    dialog.showModal();
  });
  byId("import-cancel").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    setText(error, "");
    const sent = async () => {
      const adapter = await getJson("dnd/adapters", { method: "POST", form: new FormData(form) });
      dialog.close();
      tell(`${adapter.name} is imported.`, adapter.notes);
    };
    const failed = (failure) => {
      if (failure.status === 401) dialog.close();
      setText(error, worded(failure));
    };
    if (await during(send, sent, failed)) changed();
  });
}
