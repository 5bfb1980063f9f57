// Call tools through the proxy with an SDK of TypeScript: print each outcome as a line of JSON.
// node client.mjs PACKAGE URL KEY TOOL...
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [sdk, url, key, ...tools] = process.argv.slice(2);
const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);

let Client, Transport, options;
if (sdk === "@modelcontextprotocol/sdk") {
  ({ Client } = await load(`${sdk}/client/index.js`));
  ({ StreamableHTTPClientTransport: Transport } = await load(`${sdk}/client/streamableHttp.js`));
} else {
  ({ Client, StreamableHTTPClientTransport: Transport } = await load(sdk));
  options = { versionNegotiation: { mode: "auto" } };
}

const show = (value) => console.log(JSON.stringify(value));
const client = new Client({ name: "test", version: "1" }, options);
const transport = new Transport(new URL(url), { requestInit: { headers: { "X-Api-Key": key } } });
await client.connect(transport);
show({ tools: (await client.listTools()).tools.map((tool) => tool.name) });
for (const tool of tools) {
  try {
    const result = await client.callTool({ name: tool, arguments: { query: "x", name: "x", amount: 100 } });
    show({ text: result.content[0].text });
  } catch (error) {
    show({ error: String(error), code: error.code, data: error.data });
  }
}
await client.close();
