// A program with the TypeScript SDK that connects a user by OAuth and calls a tool.
// node oauth_client.mjs PACKAGE URL [CLIENT_METADATA_URL]
// Each line of input is a call, or the code that the authorization has led to; each line of output is an outcome.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [sdk, url, clientMetadataUrl] = process.argv.slice(2);
const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
let Client, Transport, UnauthorizedError;
if (sdk === "@modelcontextprotocol/sdk") {
  ({ Client } = await load(`${sdk}/client/index.js`));
  ({ StreamableHTTPClientTransport: Transport } = await load(`${sdk}/client/streamableHttp.js`));
  ({ UnauthorizedError } = await load(`${sdk}/client/auth.js`));
} else {
  ({ Client, StreamableHTTPClientTransport: Transport, UnauthorizedError } = await load(sdk));
}

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const next = async () => (await lines.next()).value;
const show = (value) => console.log(JSON.stringify(value));

const redirectUrl = "http://127.0.0.1:3119/callback";
const kept = {};
const provider = {
  redirectUrl,
  clientMetadataUrl,
  clientMetadata: {
    client_name: "TypeScript", redirect_uris: [redirectUrl], token_endpoint_auth_method: "none",
    grant_types: ["authorization_code", "refresh_token"], response_types: ["code"],
  },
  state: () => "state-1",
  clientInformation: () => kept.client,
  saveClientInformation: (client) => { kept.client = client; },
  tokens: () => kept.tokens,
  saveTokens: (tokens) => { kept.tokens = tokens; },
  codeVerifier: () => kept.verifier,
  saveCodeVerifier: (verifier) => { kept.verifier = verifier; },
  discoveryState: () => kept.discovery,
  saveDiscoveryState: (state) => { kept.discovery = state; },
  redirectToAuthorization: (location) => show({ open: location.href }),
  invalidateCredentials: (scope) => {
    if (scope === "all" || scope === "client") delete kept.client;
    if (scope === "all" || scope === "tokens") delete kept.tokens;
  },
};

async function connected() {
  for (;;) {
    const transport = new Transport(new URL(url), { authProvider: provider });
    const client = new Client({ name: "test", version: "1" });
    try {
      await client.connect(transport);
      return client;
    } catch (error) {
      if (!(error instanceof UnauthorizedError)) throw error;
      const { searchParams } = new URL(await next());
      await transport.finishAuth(searchParams.get("code"), searchParams.get("iss") ?? undefined);
    }
  }
}

for (let call = await next(); call; call = await next()) {
  const client = await connected();
  const result = await client.callTool({ name: "whoami", arguments: { call } });
  show({ text: result.content[0].text, client: kept.client.client_id, token: kept.tokens.access_token });
  await client.close();
}
