"""The texts of errors that people see, by the name in `PageError.message`. Each has all languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_BACK_EN: Final = "Go back to your program and connect again."
_BACK_KO: Final = "프로그램으로 돌아가 다시 연결해 주세요."
_BACK_JA: Final = "プログラムに戻り、もう一度接続してください。"

#: The title of the page of an error.
TITLE: Final = {"en": "This did not work", "ko": "요청을 처리할 수 없습니다", "ja": "処理できませんでした"}

#: `{seconds}` and the like are values of the error.
ERRORS: Final[Mapping[str, Mapping[str, str]]] = {
    "parameters_invalid": {
        "en": "The link is malformed, or has a parameter twice. The program that opened this page made a mistake.",
        "ko": "링크의 형식이 잘못되었거나 같은 매개변수가 두 번 있습니다. 이 페이지를 연 프로그램의 오류입니다.",
        "ja": "リンクの形式が正しくないか、同じパラメーターが二つあります。このページを開いたプログラムの誤りです。",
    },
    "client_missing": {
        "en": "The link does not name the program that wants to connect (client_id).",
        "ko": "링크에 연결하려는 프로그램(client_id)이 없습니다.",
        "ja": "リンクに接続するプログラム（client_id）がありません。",
    },
    "client_unknown": {
        "en": "This server does not know the program that wants to connect, or does not allow it. Remove the connection in"
        " the program and add it again; if that does not help, ask your administrator.",
        "ko": "연결하려는 프로그램을 이 서버가 알지 못하거나 허용하지 않습니다. 프로그램에서 연결을 삭제한 후 다시 추가해"
        " 주세요. 그래도 되지 않으면 관리자에게 문의하세요.",
        "ja": "接続しようとしているプログラムは、このサーバーに登録されていないか、許可されていません。プログラムで接続を削除し、"
        "もう一度追加してください。それでも解決しない場合は管理者に連絡してください。",
    },
    "client_disabled": {
        "en": "An administrator has disabled this program.",
        "ko": "관리자가 이 프로그램을 사용 중지했습니다.",
        "ja": "このプログラムは管理者によって無効にされています。",
    },
    "redirect_uri_missing": {
        "en": "The link does not name the address to return to (redirect_uri).",
        "ko": "링크에 돌아갈 주소(redirect_uri)가 없습니다.",
        "ja": "リンクに戻り先のアドレス（redirect_uri）がありません。",
    },
    "redirect_uri_unknown": {
        "en": "The address to return to (redirect_uri) is not one of this program. Do not continue if you received this"
        " link from another person.",
        "ko": "돌아갈 주소(redirect_uri)가 이 프로그램의 주소가 아닙니다. 다른 사람이 보낸 링크라면 계속하지 마세요.",
        "ja": "戻り先のアドレス（redirect_uri）がこのプログラムのものではありません。他人から届いたリンクの場合は続行しないで"
        "ください。",
    },
    "document_refused": {
        "en": "The description of the program (client metadata document) could not be used.",
        "ko": "프로그램의 설명(클라이언트 메타데이터 문서)을 사용할 수 없습니다.",
        "ja": "プログラムの説明（クライアントメタデータ文書）を使用できませんでした。",
    },
    "store_unavailable": {
        "en": "The service is unavailable at the moment. Try again in a minute.",
        "ko": "지금은 서비스를 사용할 수 없습니다. 잠시 후 다시 시도해 주세요.",
        "ja": "現在サービスを利用できません。しばらくしてからもう一度お試しください。",
    },
    "cookie_missing": {
        "en": f"Your browser did not send the cookie of this login. Allow cookies for this site. {_BACK_EN}",
        "ko": f"브라우저가 이 로그인의 쿠키를 보내지 않았습니다. 이 사이트의 쿠키를 허용해 주세요. {_BACK_KO}",
        "ja": f"ブラウザーからこのログインの Cookie が送信されませんでした。このサイトの Cookie を許可してください。{_BACK_JA}",
    },
    "cookie_foreign": {
        "en": f"This login began in another browser. {_BACK_EN}",
        "ko": f"이 로그인은 다른 브라우저에서 시작되었습니다. {_BACK_KO}",
        "ja": f"このログインは別のブラウザーで開始されました。{_BACK_JA}",
    },
    "form_foreign": {
        "en": "Another website sent this form. Nothing was changed.",
        "ko": "다른 웹사이트가 이 양식을 보냈습니다. 변경된 내용은 없습니다.",
        "ja": "このフォームは別のウェブサイトから送信されました。何も変更されていません。",
    },
    "form_invalid": {
        "en": f"The form is incomplete. {_BACK_EN}",
        "ko": f"양식이 완전하지 않습니다. {_BACK_KO}",
        "ja": f"フォームに不足があります。{_BACK_JA}",
    },
    "ticket_invalid": {
        "en": f"This login cannot be continued. {_BACK_EN}",
        "ko": f"이 로그인을 계속할 수 없습니다. {_BACK_KO}",
        "ja": f"このログインは続行できません。{_BACK_JA}",
    },
    "ticket_expired": {
        "en": f"This login took too long. {_BACK_EN}",
        "ko": f"로그인 시간이 초과되었습니다. {_BACK_KO}",
        "ja": f"ログインの制限時間を過ぎました。{_BACK_JA}",
    },
    "user_page_expired": {
        "en": "Your sign-in has ended after 15 minutes. Open the page of your connections again to sign in.",
        "ko": "로그인한 지 15분이 지나 로그인이 만료되었습니다. 연결 페이지를 다시 열어 로그인해 주세요.",
        "ja": "サインインから 15 分が経過し、有効期限が切れました。接続のページをもう一度開いてサインインしてください。",
    },
    "account_disabled": {
        "en": "This account is disabled. Ask your administrator.",
        "ko": "사용이 중지된 계정입니다. 관리자에게 문의하세요.",
        "ja": "このアカウントは無効です。管理者に連絡してください。",
    },
    "login_ended": {
        "en": f"The API key or account of this login is no longer valid. {_BACK_EN}",
        "ko": f"로그인에 사용한 API 키 또는 계정이 더 이상 유효하지 않습니다. {_BACK_KO}",
        "ja": f"ログインに使用した API キーまたはアカウントは無効になりました。{_BACK_JA}",
    },
    "scopes_missing": {
        "en": "This API key has none of the permissions that the program asks for. Use another key, or ask your administrator.",
        "ko": "이 API 키에는 프로그램이 요청한 권한이 없습니다. 다른 키를 사용하거나 관리자에게 문의하세요.",
        "ja": "この API キーには、プログラムが要求する権限がありません。別のキーを使用するか、管理者に連絡してください。",
    },
    "live_key_needed": {
        "en": "This API key is for tests only, and the program asks for live access. Enter a live key.",
        "ko": "이 API 키는 테스트 전용인데 프로그램은 실제 환경에 대한 접근을 요청했습니다. 실제 환경용 키를 입력해 주세요.",
        "ja": "この API キーはテスト専用ですが、プログラムは本番環境へのアクセスを要求しています。本番用のキーを入力してください。",
    },
    "test_key_needed": {
        "en": "This API key is a live key, and the program asks for test access. Enter a test key.",
        "ko": "이 API 키는 실제 환경용인데 프로그램은 테스트 환경에 대한 접근을 요청했습니다. 테스트용 키를 입력해 주세요.",
        "ja": "この API キーは本番用ですが、プログラムはテスト環境へのアクセスを要求しています。テスト用のキーを入力してください。",
    },
    "service_client": {
        "en": "An administrator uses this program as a service of your account, so that it cannot connect in a browser too.",
        "ko": "관리자가 이 프로그램을 계정의 서비스로 사용하고 있어 브라우저에서는 연결할 수 없습니다.",
        "ja": "このプログラムは管理者がアカウントのサービスとして使用しているため、ブラウザーからは接続できません。",
    },
    "too_many_requests": {
        "en": "Too many requests. Try again in {seconds} seconds.",
        "ko": "요청이 너무 많습니다. {seconds}초 후에 다시 시도해 주세요.",
        "ja": "リクエストが多すぎます。{seconds} 秒後にもう一度お試しください。",
    },
    "not_found": {
        "en": "This page does not exist.",
        "ko": "페이지가 존재하지 않습니다.",
        "ja": "このページは存在しません。",
    },
    "method_not_allowed": {
        "en": "This page cannot be used in this way.",
        "ko": "이 페이지는 이런 방식으로 사용할 수 없습니다.",
        "ja": "このページはこの方法では利用できません。",
    },
    "body_too_large": {
        "en": "The request is too large.",
        "ko": "요청이 너무 큽니다.",
        "ja": "リクエストが大きすぎます。",
    },
    "request_malformed": {
        "en": "The request is malformed.",
        "ko": "요청의 형식이 잘못되었습니다.",
        "ja": "リクエストの形式が正しくありません。",
    },
    "internal_error": {
        "en": "Something went wrong on this server. Try again later.",
        "ko": "서버에 오류가 발생했습니다. 나중에 다시 시도해 주세요.",
        "ja": "サーバーでエラーが発生しました。後でもう一度お試しください。",
    },
    "login_unavailable": {
        "en": "The identity provider is unavailable at the moment. Try again in a minute.",
        "ko": "지금은 ID 공급자를 사용할 수 없습니다. 잠시 후 다시 시도해 주세요.",
        "ja": "現在 ID プロバイダーを利用できません。しばらくしてからもう一度お試しください。",
    },
    "login_refused": {
        "en": f"The identity provider did not sign you in. {_BACK_EN}",
        "ko": f"ID 공급자에서 로그인하지 못했습니다. {_BACK_KO}",
        "ja": f"ID プロバイダーでサインインできませんでした。{_BACK_JA}",
    },
    "login_failed": {
        "en": f"The response of the identity provider could not be used. {_BACK_EN}",
        "ko": f"ID 공급자의 응답을 사용할 수 없습니다. {_BACK_KO}",
        "ja": f"ID プロバイダーの応答を使用できませんでした。{_BACK_JA}",
    },
    "subject_unlinked": {
        "en": "You have signed in, and your account is not linked to a user of this service. Give these values to your"
        " administrator. Issuer: {issuer} Subject: {subject}",
        "ko": "로그인했지만 이 서비스의 사용자와 연결되지 않은 계정입니다. 다음 값을 관리자에게 전달하세요. 발급자: {issuer}"
        " 주체: {subject}",
        "ja": "サインインしましたが、アカウントがこのサービスのユーザーに関連付けられていません。次の値を管理者に伝えてください。"
        "発行者: {issuer} サブジェクト: {subject}",
    },
    "tenant_unknown": {
        "en": "You have signed in, and your organisation has no access to this service. Ask your administrator.",
        "ko": "로그인했지만 조직에 이 서비스에 대한 접근 권한이 없습니다. 관리자에게 문의하세요.",
        "ja": "サインインしましたが、所属組織にはこのサービスへのアクセス権がありません。管理者に連絡してください。",
    },
}
