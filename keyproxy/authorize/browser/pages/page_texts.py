"""The texts of the pages, by name. Each has all languages. `{client}` and the like are filled in as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

TEXTS: Final[Mapping[str, Mapping[str, str]]] = {
    # -- login
    "login_title": {"en": "Sign in", "ko": "로그인", "ja": "サインイン"},
    "login_for_client": {
        "en": "{client} ({host}) wants to connect to {resource}.",
        "ko": "{client} ({host}) 프로그램이 {resource} 주소에 연결하려고 합니다.",
        "ja": "{client}（{host}）が {resource} への接続を求めています。",
    },
    "login_for_user_page": {
        "en": "Sign in to see the programs that are connected to {resource}.",
        "ko": "{resource} 주소에 연결된 프로그램을 보려면 로그인하세요.",
        "ja": "{resource} に接続されているプログラムを表示するには、サインインしてください。",
    },
    "key_label": {"en": "API key", "ko": "API 키", "ja": "API キー"},
    "key_hint": {
        "en": "Enter it only at {issuer}. The program does not receive it.",
        "ko": "{issuer} 주소에서만 입력하세요. 프로그램에는 전달되지 않습니다.",
        "ja": "{issuer} でのみ入力してください。プログラムには渡されません。",
    },
    "login_button": {"en": "Continue", "ko": "계속", "ja": "続ける"},
    "key_unknown": {
        "en": "This API key is not valid. Check that you have copied all of it.",
        "ko": "유효하지 않은 API 키입니다. 전체를 복사했는지 확인하세요.",
        "ja": "この API キーは無効です。全体をコピーしたか確認してください。",
    },
    "key_expired": {
        "en": "This API key has expired. Enter another key.",
        "ko": "만료된 API 키입니다. 다른 키를 입력해 주세요.",
        "ja": "この API キーは有効期限が切れています。別のキーを入力してください。",
    },
    "key_revoked": {
        "en": "This API key has been revoked. Enter another key.",
        "ko": "폐기된 API 키입니다. 다른 키를 입력해 주세요.",
        "ja": "この API キーは失効しています。別のキーを入力してください。",
    },
    "key_suspended": {
        "en": "This API key is suspended. Ask your administrator.",
        "ko": "일시 중지된 API 키입니다. 관리자에게 문의하세요.",
        "ja": "この API キーは一時停止されています。管理者に連絡してください。",
    },
    "key_account_disabled": {
        "en": "The account of this API key is disabled. Ask your administrator.",
        "ko": "이 API 키의 계정은 사용이 중지되었습니다. 관리자에게 문의하세요.",
        "ja": "この API キーのアカウントは無効です。管理者に連絡してください。",
    },
    # -- consent
    "consent_title": {
        "en": "Allow {client} to connect?",
        "ko": "{client}의 연결을 허용하시겠습니까?",
        "ja": "{client} の接続を許可しますか？",
    },
    "unnamed": {"en": "A program without a name", "ko": "이름 없는 프로그램", "ja": "名前のないプログラム"},
    "not_verified": {
        "en": "This program is not verified: any program can use this name. Check the address below.",
        "ko": "확인되지 않음: 어떤 프로그램이든 이 이름을 사용할 수 있습니다. 아래 주소를 확인하세요.",
        "ja": "未確認：この名前はどのプログラムでも使用できます。以下のアドレスを確認してください。",
    },
    "destination": {"en": "Access goes to", "ko": "접근 권한을 받는 곳", "ja": "アクセス権の付与先"},
    "loopback": {
        "en": "This is a program on your own device. Allow it only if you have just started the connection yourself.",
        "ko": "사용 중인 기기의 프로그램입니다. 방금 직접 연결을 시작한 경우에만 허용하세요.",
        "ja": "お使いのデバイス上のプログラムです。今ご自身で接続を開始した場合にのみ許可してください。",
    },
    "user": {"en": "You are", "ko": "사용자", "ja": "ユーザー"},
    "resource": {"en": "It can use", "ko": "사용 대상", "ja": "利用対象"},
    "test_traffic": {"en": "for tests", "ko": "테스트용", "ja": "テスト用"},
    "scopes": {"en": "With these permissions", "ko": "권한", "ja": "権限"},
    "no_scopes": {
        "en": "none in particular",
        "ko": "특별한 권한 없음",
        "ja": "特別な権限なし",
    },
    "allow": {"en": "Allow", "ko": "허용", "ja": "許可"},
    "deny": {"en": "Deny", "ko": "거부", "ja": "拒否"},
    "other_account": {"en": "Use another account", "ko": "다른 계정 사용", "ja": "別のアカウントを使用"},
    # -- connections
    "connections_title": {"en": "Connected programs", "ko": "연결된 프로그램", "ja": "接続済みのプログラム"},
    "no_connections": {
        "en": "No program is connected. Programs appear here after you have allowed them.",
        "ko": "연결된 프로그램이 없습니다. 연결을 허용한 프로그램이 여기에 표시됩니다.",
        "ja": "接続されているプログラムはありません。接続を許可したプログラムがここに表示されます。",
    },
    "more_connections": {
        "en": "There are more connections than this page shows.",
        "ko": "이 페이지에 표시된 것보다 더 많은 연결이 있습니다.",
        "ja": "このページに表示されていない接続がまだあります。",
    },
    "device": {"en": "Device connected {time}", "ko": "기기 연결: {time}", "ja": "デバイスの接続: {time}"},
    "last_token": {"en": "Last token {time}", "ko": "마지막 토큰: {time}", "ja": "最後のトークン: {time}"},
    "no_token": {"en": "No token yet", "ko": "아직 토큰 없음", "ja": "トークンはまだありません"},
    "no_devices": {
        "en": "No device is connected.",
        "ko": "연결된 기기가 없습니다.",
        "ja": "接続中のデバイスはありません。",
    },
    "end_device": {"en": "Disconnect this device", "ko": "이 기기 연결 해제", "ja": "このデバイスの接続を解除"},
    "end_program": {"en": "Disconnect {client}", "ko": "{client} 연결 해제", "ja": "{client} の接続を解除"},
    "end_all": {"en": "Disconnect everything", "ko": "모든 연결 해제", "ja": "すべての接続を解除"},
    "ended": {
        "en": "Disconnected.",
        "ko": "연결을 해제했습니다.",
        "ja": "接続を解除しました。",
    },
}


def text(name: str, language: str, **values: str) -> str:
    """A text as HTML. `values`: as HTML."""
    return TEXTS[name][language].format_map(values)
