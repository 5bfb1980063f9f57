"""The URLs of the test project."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

from project import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("seen", views.seen),
    path("seen-async", views.seen_async),
    path("streamed", views.streamed),
    path("streamed-async", views.streamed_async),
    path("guarded", views.guarded),
    path("guarded-async", views.guarded_async),
    path("shown", views.Shown.as_view()),
    path("authenticated", views.Authenticated.as_view()),
    path("keyed", views.Keyed.as_view()),
    path("keyed-without-user", views.KeyedWithoutUser.as_view()),
    path("scoped", views.Scoped.as_view()),
    path("keyed-or-user", views.KeyedOrUser.as_view()),
    path("scoped-and-refused", views.ScopedAndRefused.as_view()),
    path("unkeyed", views.Unkeyed.as_view()),
    path("throttled", views.Throttled.as_view()),
]
