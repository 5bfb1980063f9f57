// An OpenID provider, the package oidc-provider, on a loopback port. It prints its issuer. Any client may register.
import { generateKeyPairSync } from 'node:crypto'
import { createServer } from 'node:http'
import Provider from 'oidc-provider'

const key = (kind, options, alg) => ({
  ...generateKeyPairSync(kind, options).privateKey.export({ format: 'jwk' }), use: 'sig', alg, kid: `key-${alg}`,
})
const jwks = { keys: [
  key('rsa', { modulusLength: 2048 }, 'RS256'),
  key('rsa', { modulusLength: 2048 }, 'PS256'),
  key('ec', { namedCurve: 'P-256' }, 'ES256'),
  key('ed25519', {}, 'EdDSA'),
] }

const server = createServer()
server.listen(0, '127.0.0.1', () => {
  const provider = new Provider(`http://127.0.0.1:${server.address().port}`, {
    jwks,
    claims: { openid: ['sub', 'org'] },
    conformIdTokenClaims: false,
    cookies: { keys: ['a-key-for-tests'] },
    features: { registration: { enabled: true }, devInteractions: { enabled: true } },
    findAccount: (_ctx, id) => ({ accountId: id, claims: () => ({ sub: id, org: id.split('@')[1] }) }),
  })
  server.on('request', provider.callback())
  console.log(provider.issuer)
})
// The test process ends this one by closing its input.
process.stdin.resume().on('end', () => process.exit(0))
